#include "launch.cuh"

namespace quest::cuda {

template bool launch_step<__nv_bfloat16, int8_t>(const DecodeStepParams&, const Tensor&, cudaStream_t);

}  // namespace quest::cuda
