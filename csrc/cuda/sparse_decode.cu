#include <torch/csrc/stable/library.h>

#include "../namespace.h"
#include "host/launch.h"
#include "host/nvtx_range.h"
#include "host/split.h"
#include "host/value_checks.h"
#include "sparse_decode.cuh"

namespace quest::cuda {

namespace {

int64_t head_tiles(const DecodeParams& p) {
  const int share = p.size.Hq / p.pages.Hs;
  return int64_t{p.size.B} * p.size.T * p.pages.Hs * ((share + kHeadTile - 1) / kHeadTile);
}

template <class T>
void launch_decode(const DecodeKernelParams& params, int device, cudaStream_t stream) {
  const DecodeParams& p = params.op;
  const unsigned blocks = grid_size(head_tiles(p) * params.splits, "sparse_decode");
  const auto launch = [&]<class Attend>(std::type_identity<Attend>) {
    launch_in_order(decode_kernel<Attend>, blocks, Attend::kThreads, Attend::shared_bytes(p.size.D), stream, params);
  };
  bool launched = false;
  if constexpr (sizeof(T) == 2)
    if (p.q.aligned && p.k_cache.aligned && p.v_cache.aligned)
      dispatch_head_dim(p.size.D, [&]<int D>(std::integral_constant<int, D>) {
        using Attend = MmaAttend<T, D>;
        launched = has_shared(device, Attend::shared_bytes(D) + sizeof(WarpStates<Attend::kWarps>));
        if (launched) launch(std::type_identity<Attend>{});
      });
  if (!launched) launch(std::type_identity<SimtAttend<T>>{});
  if (params.partials.count == 1) return;
  const unsigned rows = grid_size(int64_t{p.size.B} * p.size.T * p.size.Hq, "sparse_decode");
  dispatch_head_dim(p.size.D, [&]<int D>(std::integral_constant<int, D>) {
    launch_in_order(decode_combine_kernel<T, D>, rows, kCombineThreads, 0, stream, params);
  });
}

}  // namespace

std::tuple<Tensor, Tensor> sparse_decode(
    Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor seq_lens, std::optional<Tensor> pages,
    std::optional<double> scale, std::optional<Tensor> new_lens) {
  DecodeParams p = check_sparse_decode(q, k_cache, v_cache, page_table, seq_lens, pages, scale, new_lens);
  const NvtxRange range("sparse_decode");
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const cudaStream_t stream = current_stream(q);
  check_values_if_requested(p, pages, stream);
  const auto empty = [&](std::vector<int64_t> shape, ScalarType dtype) {
    return torch::stable::empty(shape, dtype, std::nullopt, q.device());
  };
  const std::vector<int64_t> shape(q.sizes().begin(), q.sizes().end());
  Tensor out = empty(shape, q.scalar_type());
  Tensor lse = empty({shape.begin(), shape.end() - 1}, ScalarType::Float);
  if (lse.numel() == 0) return {out, lse};
  p.out = out.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  // One partial at least: an empty list still has its rows of zeros to write.
  const int64_t tokens = int64_t{p.pages.K} << p.paging.page_shift;
  const SplitPlan plan(
      head_tiles(p), std::max<int64_t>(1, (tokens + kTileTokens - 1) / kTileTokens),
      2 * device_attribute(cudaDevAttrMultiProcessorCount, q.get_device_index()));
  DecodeKernelParams params{
      .op = p,
      .splits = plan.splits,
      .split_tiles = plan.split_tiles,
      .partials = {.count = plan.partials, .tiles = plan.partial_tiles}};
  std::optional<Tensor> scratch;
  if (plan.partials > 1) {
    const int64_t partials = lse.numel() * plan.partials;
    scratch = empty({partials * (p.size.D + 2)}, ScalarType::Float);
    params.partials.out = static_cast<float*>(scratch->mutable_data_ptr());
    params.partials.max_sum = reinterpret_cast<float2*>(params.partials.out + partials * p.size.D);
  }
  dispatch_dtype(
      p.dtype, [&](auto element) { launch_decode<decltype(element)>(params, q.get_device_index(), stream); });
  return {out, lse};
}

QUEST_LIBRARY_IMPL(CUDA, m) { m.impl("sparse_decode", TORCH_BOX(&sparse_decode)); }

}  // namespace quest::cuda
