// What the launches share: the caller's stream, dispatch on dtype, and the value checks that QUEST_OPS_CHECK=1 asks
// for.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <vector>

#include "../checks.h"
#include "elements.cuh"
#include "softmax.cuh"

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
}

// check_head_dim in check_tensors.h admits these and no others.
template <class Launch>
void dispatch_head_dim(int32_t D, Launch&& launch) {
  switch (D) {
    case 64: return launch(std::integral_constant<int, 64>{});
    case 80: return launch(std::integral_constant<int, 80>{});
    case 96: return launch(std::integral_constant<int, 96>{});
    case 128: return launch(std::integral_constant<int, 128>{});
    case 192: return launch(std::integral_constant<int, 192>{});
    case 256: return launch(std::integral_constant<int, 256>{});
  }
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

// A block may have less than this unasked; more must be allowed for each kernel, and what is allowed may shrink.
constexpr size_t kUnasked = 32 * 1024;

template <class Params>
void allow_shared(void (*kernel)(Params), size_t shared) {
  if (shared > kUnasked)
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
}

// Whether a block can have so many bytes of shared memory.
inline bool has_shared(int device, size_t bytes) {
  return bytes <= static_cast<size_t>(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
}

// Launches a kernel that begins with wait_for_previous_kernel() (launch_order.cuh): on Hopper and newer its blocks may
// be put in place while the kernel before it drains.
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

// Blocks that a multiprocessor of the current device holds at once.
template <class Params>
int blocks_a_processor(void (*kernel)(Params), int threads, size_t shared) {
  allow_shared(kernel, shared);
  int count = 0;
  STD_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, threads, shared));
  return count;
}

// How lists of chunks are cut: into parts that are folded together later, a chunk or a span of them, and runs of whole
// parts, each one block's work at a time, where `blocks` run at once.
struct ChunkSplit {
  int32_t parts, part_chunks, runs, run_chunks;  // of a list
  ChunkSplit(int64_t lists, int64_t chunks, int64_t blocks) {
    const int64_t spans = (chunks + kSpanChunks - 1) / kSpanChunks;
    const bool large = lists * spans >= blocks * 9 / 10;
    const int64_t run = large ? kSpanChunks : std::max<int64_t>(1, (lists * chunks + blocks - 1) / blocks);
    run_chunks = static_cast<int32_t>(run), runs = static_cast<int32_t>((chunks + run - 1) / run);
    part_chunks = large ? kSpanChunks : 1, parts = static_cast<int32_t>(large ? spans : chunks);
  }
};

// Device integers copied to the host, so that the CPU's value checks can read them.
class HostCopies {
 public:
  explicit HostCopies(cudaStream_t stream) : stream_(stream) {
    cudaStreamCaptureStatus status;
    STD_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
    STD_TORCH_CHECK(
        status == cudaStreamCaptureStatusNone,
        "QUEST_OPS_CHECK=1 needs a synchronisation, which a CUDA graph cannot capture: unset it while capturing");
  }
  // Replaces the rows x columns matrix at *data by a packed copy on the host; its row stride becomes `columns`.
  void fetch(const int32_t*& data, int64_t rows, int64_t columns, int64_t stride) {
    if (!data) return;
    std::vector<int32_t>& copy = copies_.emplace_back(rows * columns + 1);
    if (rows > 0 && columns > 0)
      STD_CUDA_CHECK(cudaMemcpy2DAsync(
          copy.data(), columns * 4, data, (rows > 1 ? stride : columns) * 4, columns * 4, rows, cudaMemcpyDeviceToHost,
          stream_));
    data = copy.data();
  }
  void wait() const { STD_CUDA_CHECK(cudaStreamSynchronize(stream_)); }

 private:
  cudaStream_t stream_;
  std::vector<std::vector<int32_t>> copies_;
};

inline void fetch_paging(HostCopies& host, Paging& g, int32_t B) {
  host.fetch(g.page_table, B, g.P, g.page_table_stride);
  g.page_table_stride = g.P;
  host.fetch(g.seq_lens, 1, B, B);
}

inline void fetch_extra(HostCopies& host, AppendParams& p) { host.fetch(p.new_lens, 1, p.size.B, p.size.B); }
inline void fetch_extra(HostCopies& host, UpdateBoundsParams& p) { host.fetch(p.first_token, 1, p.size.B, p.size.B); }
inline void fetch_extra(HostCopies&, EstimateParams&) {}
inline void fetch_extra(HostCopies&, TopkParams&) {}

template <class Params>
void check_values_if_requested(Params p, cudaStream_t stream) {
  if (!value_checks_requested()) return;
  HostCopies host(stream);
  fetch_paging(host, p.paging, p.size.B);
  fetch_extra(host, p);
  host.wait();
  check_values(p);
}

inline void check_values_if_requested(DecodeStepParams p, cudaStream_t stream) {
  if (!value_checks_requested()) return;
  HostCopies host(stream);
  fetch_paging(host, p.paging, p.size.B);
  fetch_paging(host, p.append.paging, p.size.B);
  host.wait();
  check_values(p);
}

// `pages` has three strides: it is made contiguous first, which only a debugging run pays for.
inline void check_values_if_requested(DecodeParams p, const std::optional<Tensor>& pages, cudaStream_t stream) {
  if (!value_checks_requested()) return;
  HostCopies host(stream);
  fetch_paging(host, p.paging, p.size.B);
  if (pages) {
    const Tensor packed = torch::stable::contiguous(*pages);
    p.pages = static_cast<const int32_t*>(packed.const_data_ptr());
    p.pages_stride_h = p.K, p.pages_stride_t = int64_t{p.K} * p.Hs, p.pages_stride_b = p.pages_stride_t * p.size.T;
    host.fetch(p.pages, int64_t{p.size.B} * p.size.T * p.Hs, p.K, p.K);
    host.wait();
  }
  host.wait();
  check_values(p);
}

}  // namespace quest::cuda
