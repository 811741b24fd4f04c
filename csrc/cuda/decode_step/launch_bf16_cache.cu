#include "launch.cuh"

namespace quest::cuda {

template bool launch_step<__nv_bfloat16, __nv_bfloat16>(const DecodeStepParams&, const Tensor&, cudaStream_t);

}  // namespace quest::cuda
