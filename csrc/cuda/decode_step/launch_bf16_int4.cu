#include "launch.cuh"

namespace quest::cuda {

template bool launch_step<__nv_bfloat16, Nibbles>(const DecodeStepParams&, const Tensor&, cudaStream_t);

}  // namespace quest::cuda
