#include <torch/csrc/stable/library.h>

#include "../namespace.h"
#include "host/launch.h"
#include "host/nvtx_range.h"
#include "host/value_checks.h"
#include "topk_pages.cuh"

namespace quest::cuda {

namespace {

// A row is split only if the candidates left fit into one block's shared memory.
int32_t count_splits(const TopkParams& p) {
  const int64_t splits = (int64_t{p.paging.P} + kTopkKeys - 1) / kTopkKeys, candidates = splits * p.K;
  const bool few = candidates <= std::min(p.paging.P / 2, kTopkKeys);
  return p.reduce != GroupReduce::soft && few && splits > 0 ? static_cast<int32_t>(splits) : 1;
}

}  // namespace

Tensor topk_pages(
    Tensor scores, Tensor seq_lens, int64_t page_size, int64_t k, int64_t num_kv_heads, int64_t group_reduce,
    int64_t sink_pages, int64_t recent_pages, double scale, std::optional<Tensor> new_lens,
    std::optional<Tensor> budgets, int64_t dense_below) {
  TopkParams p = check_topk_pages(
      scores, seq_lens, page_size, k, num_kv_heads, group_reduce, sink_pages, recent_pages, scale, new_lens, budgets,
      dense_below);
  const NvtxRange range("topk");
  const torch::stable::accelerator::DeviceGuard guard(scores.get_device_index());
  const cudaStream_t stream = current_stream(scores);
  check_values_if_requested(p, stream);
  std::vector<int64_t> shape(scores.sizes().begin(), scores.sizes().end());
  shape.back() = p.K;
  shape[shape.size() - 2] = p.Hs;
  Tensor pages = torch::stable::empty(shape, ScalarType::Int, std::nullopt, scores.device());
  if (pages.numel() == 0) return pages;
  p.pages = static_cast<int32_t*>(pages.mutable_data_ptr());
  const int64_t rows = int64_t{p.size.B} * p.size.T * p.Hs;
  TopkKernelParams params{.op = p, .splits = count_splits(p), .split_best = nullptr, .keys = nullptr};
  const int vecs = vecs_per_thread<kTopkThreads>(p.paging.P) * kTopkThreads;
  Tensor scratch;
  if (params.splits > 1) {
    scratch = torch::stable::empty({rows * params.splits * p.K}, ScalarType::Int, std::nullopt, scores.device());
    params.split_best = static_cast<int32_t*>(scratch.mutable_data_ptr());
  } else if (p.paging.P > kTopkKeys) {
    scratch = torch::stable::empty({rows * vecs * kVecKeys}, ScalarType::Int, std::nullopt, scores.device());
    params.keys = static_cast<uint32_t*>(scratch.mutable_data_ptr());
  }
  const size_t heads = (2 * sizeof(float) * (p.size.Hq / p.Hs) + 15) / 16 * 16;
  const size_t shared = padded(std::min(vecs, kTopkKeys / kVecKeys)) * sizeof(uint4) + heads;
  const unsigned blocks = grid_size(rows * params.splits, "topk_pages");
  const bool few = blocks <= unsigned(device_attribute(cudaDevAttrMultiProcessorCount, scores.get_device_index()));
  const bool ragged = p.paging.new_lens || p.budgets || p.dense_below;
  auto* const kernel = few ? (ragged ? topk_pages_kernel<1, true> : topk_pages_kernel<1, false>)
                           : (ragged ? topk_pages_kernel<2, true> : topk_pages_kernel<2, false>);
  launch_in_order(kernel, blocks, kTopkThreads, shared, stream, params);
  if (params.splits > 1)
    launch_in_order(topk_best_kernel, grid_size(rows, "topk_pages"), kTopkThreads, shared, stream, params);
  return pages;
}

QUEST_LIBRARY_IMPL(CUDA, m) { m.impl("topk_pages", TORCH_BOX(&topk_pages)); }

}  // namespace quest::cuda
