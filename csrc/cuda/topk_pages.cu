#include <torch/csrc/stable/library.h>

#include "../namespace.h"
#include "launch.h"
#include "profiler_range.h"
#include "topk_pages.cuh"

namespace quest::cuda {

namespace {

template <int kThreads>
void launch_topk(const TopkParams& p, int device, cudaStream_t stream) {
  const unsigned rows = grid_size(int64_t{p.size.B} * p.size.T * p.Hs, "topk_pages");
  const int64_t heads = 2 * sizeof(float) * (p.size.Hq / p.Hs);
  const int64_t room = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) -
                       static_cast<int64_t>(sizeof(SelectShared<kThreads>) + 1024) - heads;
  const int64_t kept = std::min<int64_t>(
      int64_t{own_fours<kThreads>(p.paging.P)} * kThreads, room / static_cast<int64_t>(sizeof(uint4)) * 8 / 9);
  launch_in_order(
      topk_pages_kernel<kThreads>, rows, kThreads, four_place(static_cast<int>(kept)) * sizeof(uint4) + heads, stream,
      TopkLaunch{p, static_cast<int32_t>(kept)});
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
  const bool few = own_fours<kFewTopkThreads>(p.paging.P) == 1;
  (few ? launch_topk<kFewTopkThreads> : launch_topk<kTopkThreads>)(p, scores.get_device_index(), stream);
  return pages;
}

QUEST_LIBRARY_IMPL(CUDA, m) { m.impl("topk_pages", TORCH_BOX(&topk_pages)); }

}  // namespace quest::cuda
