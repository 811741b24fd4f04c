// The tokens, query heads and warp results that both ways of attending to a tile share.
//
// Scores stay as the dot products left them, and only their differences are scaled, so that large logits lose nothing.
#pragma once

#include "softmax_state.cuh"

namespace quest::cuda {

constexpr int kHeadTile = 8;      // query heads of a block
constexpr int kNoToken = -1;      // in place of a physical page: nothing to attend to
constexpr int kInvalidPage = -2;  // a page that the tables do not have: a NaN score, so that the mistake shows

__device__ __forceinline__ float token_bias(int page) { return page >= 0 ? 0.f : page == kNoToken ? -INFINITY : NAN; }

template <class T>
__device__ __forceinline__ const T* token_row(const Cache& cache, int page, int head, int slot) {
  if (page < 0) return nullptr;
  return static_cast<const T*>(cache.data) + int64_t{page} * cache.stride_n + head * cache.stride_h +
         slot * cache.stride_s;
}

// The query heads of a block: head h of `heads` is at data + h * stride, and all read KV head kv_head.
template <class T>
struct QueryTile {
  const T* data;
  int64_t stride;
  int heads, kv_head;
};

// The softmax state of each warp's tokens, without its values.
template <int kWarps>
struct WarpStates {
  float max[kWarps][kHeadTile];
  float sum[kWarps][kHeadTile];
};

}  // namespace quest::cuda
