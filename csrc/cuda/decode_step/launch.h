// One launch for a step, for each dtype that has such a kernel. False where the device's shared memory is too small.
#pragma once

#include "../host/launch.h"
#include "params.cuh"

namespace quest::cuda {

bool launch_f16(const DecodeStepParams& p, const Tensor& q, cudaStream_t stream);
bool launch_bf16(const DecodeStepParams& p, const Tensor& q, cudaStream_t stream);

}  // namespace quest::cuda
