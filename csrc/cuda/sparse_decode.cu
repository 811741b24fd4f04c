#include "sparse_decode.cuh"

#include <torch/csrc/stable/library.h>

#include "../namespace.h"
#include "launch.h"

namespace quest::cuda {

namespace {

template <class T>
void launch_decode(const DecodeParams& p, cudaStream_t stream) {
  const int share = p.size.Hq / p.Hs, tiles = (share + kMmaHeads - 1) / kMmaHeads;
  const unsigned blocks =
      grid_size(int64_t{p.size.B} * p.size.T * p.Hs * tiles * p.chunks, "sparse_decode");
  const size_t shared = sizeof(float) * kDecodeWarps * kMmaHeads * p.size.D;  // 32 KiB at most
  const auto launch_simt = [&] {
    decode_chunk_kernel<T, SimtDecode<T>><<<blocks, kDecodeThreads, shared, stream>>>(p);
  };
  if constexpr (sizeof(T) == 2) {
    if (p.q.aligned && p.k_cache.aligned && p.v_cache.aligned)
      dispatch_head_dim(p.size.D, [&]<int D>(std::integral_constant<int, D>) {
        decode_chunk_kernel<T, MmaDecode<T, D>><<<blocks, kDecodeThreads, shared, stream>>>(p);
      });
    else launch_simt();
  } else {
    launch_simt();
  }
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  if (p.chunks > 1) {
    decode_combine_kernel<T>
        <<<grid_size(int64_t{p.size.B} * p.size.T * p.size.Hq, "sparse_decode"), kCombineThreads, 0, stream>>>(p);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }
}

}  // namespace

std::tuple<Tensor, Tensor> sparse_decode(
    Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor seq_lens, std::optional<Tensor> pages,
    std::optional<double> scale) {
  DecodeParams p = check_sparse_decode(q, k_cache, v_cache, page_table, seq_lens, pages, scale);
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
  // One chunk at least: an empty list still has its rows of zeros to write.
  p.chunks = std::max(1, static_cast<int>(((int64_t{p.K} << p.paging.page_shift) + kChunkTokens - 1) / kChunkTokens));
  std::optional<Tensor> partial;
  if (p.chunks > 1) {
    const int64_t parts = lse.numel() * p.chunks;
    partial = empty({parts * (p.size.D + 1)}, ScalarType::Float);
    p.partial_out = static_cast<float*>(partial->mutable_data_ptr());
    p.partial_lse = p.partial_out + parts * p.size.D;
  }
  dispatch_dtype(p.dtype, [&](auto element) { launch_decode<decltype(element)>(p, stream); });
  return {out, lse};
}

QUEST_LIBRARY_IMPL(CUDA, m) { m.impl("sparse_decode", TORCH_BOX(&sparse_decode)); }

}  // namespace quest::cuda
