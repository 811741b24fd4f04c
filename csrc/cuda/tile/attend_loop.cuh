// The loop over tiles of a list of tokens, for sparse_decode and decode_step: attend by warps, then merge the warps.
#pragma once

#include "attend.cuh"

namespace quest::cuda {

// Merges the warps' states of a tile, by kHeadThreads threads a head: each owns every kHeadThreads-th vector of four
// head dimensions.
template <class Attend>
struct WarpMerge {
  static constexpr int kHeadThreads = Attend::kThreads / kHeadTile;
  static_assert(kWarpSize % kHeadThreads == 0 && kHeadThreads % Attend::kWarps == 0);
  static constexpr int kVecs = (Attend::kMaxD / 4 + kHeadThreads - 1) / kHeadThreads;
  using State = SoftmaxState<kVecs>;

  static __device__ __forceinline__ int head() { return threadIdx.x / kHeadThreads; }
  static __device__ __forceinline__ int first_head() { return threadIdx.x / kWarpSize * kWarpSize / kHeadThreads; }
  static __device__ __forceinline__ int first_vec() { return threadIdx.x % kHeadThreads; }

  // warp_out: [kWarps] of [heads, D], stride apart. By whole warps; threads past the last head get garbage.
  static __device__ __forceinline__ State
  merge(const Softmax& softmax, const WarpStates<Attend::kWarps>& warps, const float* warp_out, int stride, int D) {
    State tile;
    // A lane computes the weight of one warp.
    const int lane = threadIdx.x % kWarpSize, own = lane % Attend::kWarps;
    const float max = warps.max[own][head()];
    tile.max = max;
#pragma unroll
    for (int step = 1; step < Attend::kWarps; step *= 2)
      tile.max = fmaxf(tile.max, __shfl_xor_sync(kFullMask, tile.max, step));
    const float own_weight = softmax.weight(max, tile.max);
    float weight[Attend::kWarps];
#pragma unroll
    for (int w = 0; w < Attend::kWarps; ++w) {
      weight[w] = __shfl_sync(kFullMask, own_weight, lane - own + w);
      tile.sum = __fmaf_rn(weight[w], warps.sum[w][head()], tile.sum);
    }
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      const int vec = first_vec() + i * kHeadThreads;
      if (vec * 4 >= D) continue;
      float4& x = tile.out[i];
#pragma unroll
      for (int w = 0; w < Attend::kWarps; ++w) {
        const float4 y = reinterpret_cast<const float4*>(warp_out + w * stride + head() * D)[vec];
        x.x = __fmaf_rn(weight[w], y.x, x.x), x.y = __fmaf_rn(weight[w], y.y, x.y);
        x.z = __fmaf_rn(weight[w], y.z, x.z), x.w = __fmaf_rn(weight[w], y.w, x.w);
      }
    }
    return tile;
  }
};

// Attends to tokens [first, end) of a list, tile after tile, by one block. Keys are copied one tile ahead.
//
// find(offset): the physical page of this lane's token in the tile at first + offset, looked up two tiles ahead.
// take(tile, state): receives the merged state of each tile, counted from the first.
template <class Attend, class Find, class Take>
__device__ __forceinline__ void attend_tiles(
    Attend& attend, const Softmax& softmax, const Cache& k, const Cache& v,
    const QueryTile<typename Attend::Element>& query, int D, int first, int end, int page_size,
    WarpStates<Attend::kWarps>& warps, typename Attend::Shared& shared, Find&& find, Take&& take) {
  using Merge = WarpMerge<Attend>;
  const int warp = threadIdx.x / kWarpSize, warp_token = first + warp * Attend::kTokens;
  int page = kNoToken, next_page = find(0);
#pragma unroll 1
  for (int offset = -kTileTokens; first + offset < end; offset += kTileTokens) {
    const int ahead = offset + kTileTokens, stage = ahead / kTileTokens % 2;
    const bool more = first + ahead < end;
    if (more) attend.copy_keys(k, query.kv_head, next_page, warp_token + ahead, page_size, stage);
    commit_copies();
    const int page_after = first + ahead + kTileTokens < end ? find(ahead + kTileTokens) : kNoToken;
    if (offset >= 0)
      attend.attend(
          softmax, k, v, query, page, warp_token + offset, page_size, stage ^ 1, warps.max[warp], warps.sum[warp],
          shared);
    if (more) attend.copy_values(v, query.kv_head, next_page, warp_token + ahead, page_size);
    commit_copies();
    if (offset >= 0) {
      __syncthreads();
      if (Merge::first_head() < query.heads) {
        const typename Merge::State tile =
            Merge::merge(softmax, warps, attend.results(stage ^ 1), attend.results_stride(query.heads, D), D);
        if (Merge::head() < query.heads) take(offset / kTileTokens, tile);
      }
      __syncthreads();
    } else {
      attend.load_query(query);
    }
    page = next_page, next_page = page_after;
  }
}

}  // namespace quest::cuda
