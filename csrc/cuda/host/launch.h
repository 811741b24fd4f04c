// The host side of a launch: the caller's stream, dispatch on dtype and head_dim, and the launch itself.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <utility>

#include "../../checks.h"
#include "../core/elements.cuh"

namespace quest::cuda {

inline cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

template <class Launch>
void dispatch_dtype(DType dtype, Launch&& launch) {
  switch (dtype) {
    case DType::f32: return launch(float{});
    case DType::f16: return launch(__half{});
    case DType::bf16: return launch(__nv_bfloat16{});
  }
  STD_TORCH_CHECK(false, "no kernel for dtype number ", static_cast<int32_t>(dtype));
}

// Calls launch(integral_constant<D>) for the head_dim of kHeadDims that equals D.
template <class Launch>
void dispatch_head_dim(int32_t D, Launch&& launch) {
  const auto try_each = [&]<size_t... i>(std::index_sequence<i...>) {
    return ((D == kHeadDims[i] && (launch(std::integral_constant<int, kHeadDims[i]>{}), true)) || ...);
  };
  STD_TORCH_CHECK(try_each(std::make_index_sequence<std::size(kHeadDims)>{}), "no kernel for head_dim ", D);
}

inline unsigned grid_size(int64_t blocks, const char* op) {
  STD_TORCH_CHECK(blocks <= 0x7fffffff, op, " needs ", blocks, " blocks, more than a CUDA grid holds");
  return static_cast<unsigned>(blocks);
}

inline int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

// A block may use this much dynamic shared memory by default; a kernel that uses more must ask for it.
constexpr size_t kDefaultShared = 32 * 1024;

template <class Params>
void allow_shared(void (*kernel)(Params), size_t shared) {
  if (shared > kDefaultShared)
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
}

// Whether the device gives a block this much shared memory.
inline bool has_shared(int device, size_t bytes) {
  return bytes <= static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
}

// Launches a kernel that begins with wait_for_previous_kernel() (ptx.cuh). On Hopper and newer its blocks may be placed
// while its predecessor drains.
template <class Params>
void launch_in_order(
    void (*kernel)(Params), unsigned blocks, int threads, size_t shared, cudaStream_t stream, const Params& p) {
  int device = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  allow_shared(kernel, shared);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks, config.blockDim = threads, config.dynamicSmemBytes = shared, config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = device_attribute(cudaDevAttrComputeCapabilityMajor, device) >= 9;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, p));
}

// Resident blocks of a kernel on each multiprocessor of the current device.
template <class Params>
int blocks_per_processor(void (*kernel)(Params), int threads, size_t shared) {
  allow_shared(kernel, shared);
  int count = 0;
  STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, threads, shared));
  return count;
}

}  // namespace quest::cuda
