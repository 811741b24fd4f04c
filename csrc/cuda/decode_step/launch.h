// One launch for a step, for each dtype T that has such a kernel and each type of bounds: T, int8_t or Nibbles. A file
// for each, since they take long to compile.
#pragma once

#include "../host/launch.h"
#include "../tile/bounds_codes.cuh"
#include "params.cuh"

namespace quest::cuda {

// False where the device's shared memory is too small.
template <class T, class Bound>
bool launch_step(const DecodeStepParams& p, const Tensor& q, cudaStream_t stream);

}  // namespace quest::cuda
