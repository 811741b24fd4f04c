#include "launch.cuh"
#include "launch.h"

namespace quest::cuda {

bool launch_f16(const DecodeStepParams& p, const Tensor& q, cudaStream_t stream) {
  return launch_step<__half>(p, q, stream);
}

}  // namespace quest::cuda
