#include <torch/csrc/stable/library.h>

#include "../namespace.h"
#include "launch.h"
#include "profiler_range.h"
#include "sparse_decode.cuh"

namespace quest::cuda {

namespace {

int64_t list_tiles(const DecodeParams& p) {
  const int share = p.size.Hq / p.Hs;
  return int64_t{p.size.B} * p.size.T * p.Hs * ((share + kMmaHeads - 1) / kMmaHeads);
}

template <class T>
void launch_decode(const DecodeParams& p, int device, cudaStream_t stream) {
  const unsigned blocks = grid_size(list_tiles(p) * p.runs, "sparse_decode");
  const unsigned rows = grid_size(int64_t{p.size.B} * p.size.T * p.size.Hq, "sparse_decode");
  const auto launch = [&]<class Attend>(std::type_identity<Attend>) {
    launch_in_order(decode_kernel<Attend>, blocks, Attend::kThreads, Attend::shared_bytes(p.size.D), stream, p);
  };
  bool launched = false;
  if constexpr (sizeof(T) == 2)
    if (p.q.aligned && p.k_cache.aligned && p.v_cache.aligned)
      dispatch_head_dim(p.size.D, [&]<int D>(std::integral_constant<int, D>) {
        using Attend = MmaAttend<T, D>;
        launched = has_shared(device, Attend::shared_bytes(D) + sizeof(WarpResults<Attend::kWarps>));
        if (launched) launch(std::type_identity<Attend>{});
      });
  if (!launched) launch(std::type_identity<SimtAttend<T>>{});
  if (p.parts == 1) return;
  if (p.part_chunks == 1)
    launch_in_order(decode_combine_kernel<T, kSpanChunks>, rows, kCombineThreads, 0, stream, p);
  else
    launch_in_order(decode_combine_kernel<T, 1>, rows, kCombineThreads, 0, stream, p);
}

}  // namespace

std::tuple<Tensor, Tensor> sparse_decode(
    Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor seq_lens, std::optional<Tensor> pages,
    std::optional<double> scale) {
  DecodeParams p = check_sparse_decode(q, k_cache, v_cache, page_table, seq_lens, pages, scale);
  const ProfilerRange range("sparse_decode");
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
  // One part at least: an empty list still has its rows of zeros to write.
  const int64_t tokens = int64_t{p.K} << p.paging.page_shift;
  const ChunkSplit split(
      list_tiles(p), std::max<int64_t>(1, (tokens + kChunkTokens - 1) / kChunkTokens),
      2 * device_attribute(cudaDevAttrMultiProcessorCount, q.get_device_index()));
  p.parts = split.parts, p.part_chunks = split.part_chunks, p.runs = split.runs, p.run_chunks = split.run_chunks;
  std::optional<Tensor> partial;
  if (p.parts > 1) {
    const int64_t parts = lse.numel() * p.parts;
    partial = empty({parts * (p.size.D + 2)}, ScalarType::Float);
    p.partial_out = static_cast<float*>(partial->mutable_data_ptr());
    p.partial_max = p.partial_out + parts * p.size.D;
    p.partial_sum = p.partial_max + parts;
  }
  dispatch_dtype(p.dtype, [&](auto element) { launch_decode<decltype(element)>(p, q.get_device_index(), stream); });
  return {out, lse};
}

QUEST_LIBRARY_IMPL(CUDA, m) { m.impl("sparse_decode", TORCH_BOX(&sparse_decode)); }

}  // namespace quest::cuda
