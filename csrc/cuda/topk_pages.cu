#include <torch/csrc/stable/library.h>

#include "../namespace.h"
#include "launch.h"
#include "profiler_range.h"
#include "topk_pages.cuh"

namespace quest::cuda {

namespace {

// Shared memory that a block may use on every architecture from sm_80 on.
constexpr size_t kMostShared = 96 * 1024;

void launch_topk(const TopkParams& p, cudaStream_t stream) {
  const unsigned rows = grid_size(int64_t{p.size.B} * p.size.T * p.Hs, "topk_pages");
  const size_t stats = sizeof(float) * key_offset(p.size.Hq / p.Hs);
  const size_t keys = sizeof(uint32_t) * ((p.paging.P + kStretch - 1) / kStretch * kStretch);
  // Soft sums in the order of its threads, of which there must not be more for a larger capacity.
  if (p.paging.P <= 2048 && p.reduce != GroupReduce::soft)
    launch_in_order(topk_pages_kernel<512, true>, rows, 512, stats + keys, stream, p);
  else if (stats + keys <= kMostShared)
    launch_in_order(topk_pages_kernel<1024, true>, rows, 1024, stats + keys, stream, p);
  else
    launch_in_order(topk_pages_kernel<1024, false>, rows, 1024, stats, stream, p);
}

}  // namespace

Tensor topk_pages(
    Tensor scores, Tensor seq_lens, int64_t page_size, int64_t k, int64_t num_kv_heads, int64_t group_reduce,
    int64_t sink_pages, int64_t recent_pages, double scale) {
  TopkParams p =
      check_topk_pages(scores, seq_lens, page_size, k, num_kv_heads, group_reduce, sink_pages, recent_pages, scale);
  const ProfilerRange range("topk");
  const torch::stable::accelerator::DeviceGuard guard(scores.get_device_index());
  const cudaStream_t stream = current_stream(scores);
  check_values_if_requested(p, stream);
  std::vector<int64_t> shape(scores.sizes().begin(), scores.sizes().end());
  shape.back() = p.K;
  shape[shape.size() - 2] = p.Hs;
  Tensor pages = torch::stable::empty(shape, ScalarType::Int, std::nullopt, scores.device());
  if (pages.numel() == 0) return pages;
  p.pages = static_cast<int32_t*>(pages.mutable_data_ptr());
  launch_topk(p, stream);
  return pages;
}

QUEST_LIBRARY_IMPL(CUDA, m) { m.impl("topk_pages", TORCH_BOX(&topk_pages)); }

}  // namespace quest::cuda
