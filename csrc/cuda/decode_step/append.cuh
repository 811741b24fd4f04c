// Appends: a row's new token into the cache, and the bounds of the page that it is in.
#pragma once

#include "../tile/page_bounds.cuh"
#include "../tile/page_mean_std.cuh"
#include "scheduler.cuh"

namespace quest::cuda {

// The new key and value of a row, in the registers of a warp.
template <class T, int D>
struct NewToken {
  static constexpr int kVecs = D * sizeof(T) / 16, kCount = (2 * kVecs + kWarpSize - 1) / kWarpSize;
  int physical = -1;  // page to write, or -1
  uint4 at[kCount];

  // Of a sequence of `start` tokens before the step and `length` with the new one. Loads nothing if there is none.
  static __device__ __forceinline__ NewToken load(const DecodeStepParams& p, int start, int length, int b, int head) {
    NewToken token;
    if (start >= length) return token;
    token.physical = p.paging.physical(b, start >> p.paging.page_shift);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const int i = j * kWarpSize + threadIdx.x % kWarpSize;
      const NewTokens& from = i < kVecs ? p.append.k : p.append.v;
      const T* const row = static_cast<const T*>(from.data) + b * from.stride_b + head * from.stride_h;
      token.at[j] = load_once(row + i % kVecs * 8, i < 2 * kVecs);
    }
    return token;
  }
  __device__ __forceinline__ void store(const DecodeStepParams& p, int start, int head) const {
    if (physical < 0) return;
    const int slot = start & (p.paging.page_size() - 1);
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const int i = j * kWarpSize + threadIdx.x % kWarpSize;
      if (i >= 2 * kVecs) continue;
      const Cache& to = i < kVecs ? p.append.k_cache : p.append.v_cache;
      T* const row = static_cast<T*>(to.data) + physical * to.stride_n + head * to.stride_h + slot * to.stride_s;
      *reinterpret_cast<uint4*>(row + i % kVecs * 8) = at[j];
    }
  }
};

// Renews the bounds of the pages that the new tokens are in, a warp for each row. Nothing reads these bounds in this
// step, so it comes after all splits. The new key may not be in the cache yet.
template <class T, int D>
struct BoundsRenewal {
  union Shared {
    typename PageBounds<T, kWarpSize>::Shared min_max;
    typename PageMeanStd<T, kWarpSize>::Shared mean_std;
  };

  // Functions of their own: cold code must not take registers from the loops.
  static __device__ __noinline__ void renew_min_max(
      Cache cache, Bounds bounds, int page, int head, int tokens, const T* newest, Shared& shared) {
    cache.aligned = true;  // one launch needs it, and the compiler does not know
    renew_page_bounds<T, kWarpSize>(cache, bounds, D, page, head, tokens, newest, shared.min_max);
  }
  static __device__ __noinline__ void renew_mean_std(
      Cache cache, Bounds bounds, int page, int head, int tokens, const T* newest, Shared& shared) {
    cache.aligned = true;
    renew_page_mean_std<T, kWarpSize>(cache, bounds, D, page, head, tokens, newest, shared.mean_std);
  }

  template <int kHeadTiles>
  static __device__ __forceinline__ void run(const Scheduler<kHeadTiles>& scheduler, int first_row, Shared* shared) {
    const DecodeStepParams& p = scheduler.p;
    const int row = first_row + scheduler.warp, b = row / p.size.Hkv, head = row - b * p.size.Hkv;
    if (b >= p.size.B) return;
    const int start = scheduler.shared.starts[b], page = p.paging.physical(b, start >> p.paging.page_shift);
    if (start >= scheduler.shared.lengths[b] || page < 0) return;
    const T* const newest =
        static_cast<const T*>(p.append.k.data) + b * p.append.k.stride_b + head * p.append.k.stride_h;
    const int tokens = (start & (p.paging.page_size() - 1)) + 1;
    if (p.append.k_bounds.mean_std)
      renew_mean_std(p.append.k_cache, p.append.k_bounds, page, head, tokens, newest, shared[scheduler.warp]);
    else
      renew_min_max(p.append.k_cache, p.append.k_bounds, page, head, tokens, newest, shared[scheduler.warp]);
  }
};

}  // namespace quest::cuda
