#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../namespace.h"
#include "host/launch.h"
#include "host/nvtx_range.h"
#include "host/value_checks.h"
#include "rerank_pages.cuh"

namespace quest::cuda {

namespace {

template <class T>
void launch_rerank(const RerankParams& p, cudaStream_t stream) {
  const int share = p.size.Hq / p.pages.Hs, entries = kRerankTokens >> p.paging.page_shift;
  const RerankKernelParams params{.op = p, .splits = (p.pages.K + entries - 1) / entries};
  const int64_t blocks =
      int64_t{p.size.B} * p.size.T * p.pages.Hs * ((share + kMmaHeads - 1) / kMmaHeads) * params.splits;
  const unsigned grid = grid_size(blocks, "rerank_pages");
  dispatch_head_dim(p.size.D, [&]<int D>(std::integral_constant<int, D>) {
    if constexpr (sizeof(T) == 2 && rotated_block(D) == D)
      if (p.codes.aligned) return launch_in_order(rerank_kernel<T, D, true>, grid, kRerankThreads, 0, stream, params);
    launch_in_order(rerank_kernel<T, D, false>, grid, kRerankThreads, 0, stream, params);
  });
}

}  // namespace

Tensor rerank_pages(
    Tensor q, Tensor k_codes, Tensor code_scales, Tensor page_table, Tensor seq_lens, Tensor pages,
    int64_t token_reduce, double scale, std::optional<Tensor> new_lens) {
  RerankParams p =
      check_rerank_pages(q, k_codes, code_scales, page_table, seq_lens, pages, token_reduce, scale, new_lens);
  const NvtxRange range("rerank_pages");
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const cudaStream_t stream = current_stream(q);
  check_values_if_requested(p, pages, stream);
  std::vector<int64_t> shape(q.sizes().begin(), q.sizes().end());
  shape.back() = p.paging.P;
  Tensor scores = torch::stable::empty(shape, ScalarType::Float, std::nullopt, q.device());
  if (scores.numel() == 0) return scores;
  p.scores = static_cast<float*>(scores.mutable_data_ptr());
  const int64_t all = (scores.numel() + kRerankThreads - 1) / kRerankThreads;
  launch_in_order(
      fill_scores_kernel, static_cast<unsigned>(std::min<int64_t>(all, 1024)), kRerankThreads, 0, stream,
      FillParams{.scores = p.scores, .count = scores.numel()});
  if (p.pages.K == 0) return scores;
  dispatch_dtype(p.dtype, [&](auto element) { launch_rerank<decltype(element)>(p, stream); });
  return scores;
}

QUEST_LIBRARY_IMPL(CUDA, m) { m.impl("rerank_pages", TORCH_BOX(&rerank_pages)); }

}  // namespace quest::cuda
