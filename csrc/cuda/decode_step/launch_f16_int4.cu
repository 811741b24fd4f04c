#include "launch.cuh"

namespace quest::cuda {

template bool launch_step<__half, Nibbles>(const DecodeStepParams&, const Tensor&, cudaStream_t);

}  // namespace quest::cuda
