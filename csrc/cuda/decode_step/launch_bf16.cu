#include "launch.cuh"
#include "launch.h"

namespace quest::cuda {

bool launch_bf16(const DecodeStepParams& p, const Tensor& q, cudaStream_t stream) {
  return launch_step<__nv_bfloat16>(p, q, stream);
}

}  // namespace quest::cuda
