// The elementwise minimum and maximum of the keys of one page and head, by one block: the part that the kernels which
// write keys share. A thread keeps one vector of head dimensions and every `rows`-th token; the rows then meet in
// shared memory. NaN keys give NaN bounds, so that a broken page is seen and not skipped.
//
// 8-bit bounds are whole multiples of the page's scale, its largest magnitude / 127 rounded up, themselves rounded
// outward by directed division: so they stay bounds, exactly. The CPU computes the same numbers bit for bit.
#pragma once

#include "elements.cuh"

namespace quest::cuda {

constexpr int kBoundsThreads = 128;

// kVec dimensions from d on, of a page whose keys' largest magnitude is `largest`.
template <int kVec>
__device__ __forceinline__ void store_byte_bounds(
    const Bounds& bounds, int64_t page, int head, int d, const float (&lower)[kVec], const float (&upper)[kVec],
    float largest) {
  const float scale = __fdiv_ru(largest, 127.f);
  int8_t* const to = static_cast<int8_t*>(bounds.data) + page * bounds.stride_n + head * bounds.stride_h + d;
  const bool some = scale > 0.f && scale < INFINITY;  // else zeros: scores are 0, or NaN as the scale is
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    to[i] = some ? static_cast<int8_t>(floorf(__fdiv_rd(lower[i], scale))) : 0;
    to[i + bounds.stride_c] = some ? static_cast<int8_t>(ceilf(__fdiv_ru(upper[i], scale))) : 0;
  }
  if (d == 0) bounds.scales[page * bounds.scales_stride_n + head * bounds.scales_stride_h] = scale;
}

template <class T, int kThreads>
struct PageBounds {
  static constexpr int kVec = Vec<T>::kSize;
  struct Shared {
    Vec<T> lower[kThreads], upper[kThreads];
    float largest[kThreads / kWarpSize];
  };

  int vecs, rows, vec, row;   // a row of threads covers head_dim once
  bool active, some = false;  // whether any key was added
  float lower[kVec], upper[kVec];

  __device__ explicit PageBounds(int D) {
    vecs = D / kVec;
    rows = kThreads / vecs;
    vec = threadIdx.x % vecs;
    row = threadIdx.x / vecs;
    active = row < rows;
#pragma unroll
    for (int i = 0; i < kVec; ++i) lower[i] = INFINITY, upper[i] = -INFINITY;
  }

  __device__ int offset() const { return vec * kVec; }

  __device__ void add(const Vec<T>& key) {
    some = true;
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const float x = to_float(key.at[i]);
      lower[i] = nan_min(lower[i], x);
      upper[i] = nan_max(upper[i], x);
    }
  }

  // By all threads of the block, of which those past `rows` have nothing to add.
  __device__ void store(const Bounds& bounds, int64_t page, int head, Shared& shared) {
    float largest = 0.f;
    Vec<T> low, high;
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      low.at[i] = from_float<T>(lower[i]), high.at[i] = from_float<T>(upper[i]);
      if (some) largest = nan_max(largest, nan_max(fabsf(lower[i]), fabsf(upper[i])));
    }
    shared.lower[threadIdx.x] = low, shared.upper[threadIdx.x] = high;
    if (bounds.scales) {
#pragma unroll
      for (int step = 1; step < kWarpSize; step *= 2)
        largest = nan_max(largest, __shfl_xor_sync(kFullMask, largest, step));
      if (threadIdx.x % kWarpSize == 0) shared.largest[threadIdx.x / kWarpSize] = largest;
    }
    __syncthreads();
    for (int r = 1; row == 0 && r < rows; ++r) {
      low = shared.lower[r * vecs + vec], high = shared.upper[r * vecs + vec];
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        lower[i] = nan_min(lower[i], to_float(low.at[i]));
        upper[i] = nan_max(upper[i], to_float(high.at[i]));
      }
    }
    if (row == 0) {
#pragma unroll
      for (int i = 0; i < kVec; ++i) low.at[i] = from_float<T>(lower[i]), high.at[i] = from_float<T>(upper[i]);
    }
    if (bounds.scales) {
      if (row == 0) shared.lower[vec] = low, shared.upper[vec] = high;
      __syncthreads();
      store_bytes(bounds, page, head, shared);
    } else if (row == 0) {
      T* const to = static_cast<T*>(bounds.data) + page * bounds.stride_n + head * bounds.stride_h + offset();
      store_vec(to, low, bounds.aligned);
      store_vec(to + bounds.stride_c, high, bounds.aligned);
    }
  }

 private:
  // By all threads, for a directed division takes long.
  __device__ void store_bytes(const Bounds& bounds, int64_t page, int head, const Shared& shared) {
    float largest = 0.f;
    for (int w = 0; w < kThreads / kWarpSize; ++w) largest = nan_max(largest, shared.largest[w]);
    for (int d = threadIdx.x; d < vecs * kVec; d += kThreads)
      store_byte_bounds<1>(
          bounds, page, head, d, {to_float(shared.lower[d / kVec].at[d % kVec])},
          {to_float(shared.upper[d / kVec].at[d % kVec])}, largest);
  }
};

// The bounds of a page from the first `tokens` keys in it.
template <class T, int kThreads>
__device__ __forceinline__ void renew_page_bounds(
    const Cache& cache, const Bounds& to, int D, int64_t page, int head, int tokens,
    typename PageBounds<T, kThreads>::Shared& shared) {
  PageBounds<T, kThreads> bounds(D);
  const T* const keys =
      static_cast<const T*>(cache.data) + page * cache.stride_n + head * cache.stride_h + bounds.offset();
  for (int s = bounds.row; bounds.active && s < tokens; s += bounds.rows)
    bounds.add(load_vec(keys + s * cache.stride_s, cache.aligned));
  bounds.store(to, page, head, shared);
}

// The same by one warp, for a page of which the newest key is in `fresh` (and may not be in the cache yet): tokens - 1
// before it. Two rows of lanes take turns with the keys where head_dim leaves room.
template <class T, class Bound, int D>
__device__ __forceinline__ void renew_page_bounds_by_warp(
    const Cache& cache, const Bounds& to, int64_t page, int head, int tokens, const T* fresh) {
  constexpr int kVec = Vec<T>::kSize, kVecs = D / kVec, kRows = 2 * kVecs <= kWarpSize ? 2 : 1;
  const int lane = threadIdx.x % kWarpSize, vec = lane % kVecs, row = lane / kVecs;
  float lower[kVec], upper[kVec];
#pragma unroll
  for (int i = 0; i < kVec; ++i) lower[i] = INFINITY, upper[i] = -INFINITY;
  const T* const keys = static_cast<const T*>(cache.data) + page * cache.stride_n + head * cache.stride_h + vec * kVec;
  if (row < kRows) {
#pragma unroll 4
    for (int s = row; s < tokens; s += kRows) {
      const Vec<T> key =
          *reinterpret_cast<const Vec<T>*>(s + 1 < tokens ? keys + s * cache.stride_s : fresh + vec * kVec);
#pragma unroll
      for (int i = 0; i < kVec; ++i) {
        lower[i] = nan_min(lower[i], to_float(key.at[i]));
        upper[i] = nan_max(upper[i], to_float(key.at[i]));
      }
    }
  }
  float largest = 0.f;
#pragma unroll
  for (int i = 0; i < kVec; ++i) {
    if constexpr (kRows == 2) {
      lower[i] = nan_min(lower[i], __shfl_down_sync(kFullMask, lower[i], kVecs));
      upper[i] = nan_max(upper[i], __shfl_down_sync(kFullMask, upper[i], kVecs));
    }
    if (lane < kVecs) largest = nan_max(largest, nan_max(fabsf(lower[i]), fabsf(upper[i])));
  }
  if constexpr (sizeof(Bound) == 1) {
#pragma unroll
    for (int step = 1; step < kWarpSize; step *= 2)
      largest = nan_max(largest, __shfl_xor_sync(kFullMask, largest, step));
    if (lane < kVecs) store_byte_bounds(to, page, head, vec * kVec, lower, upper, largest);
  } else if (lane < kVecs) {
    Vec<T> low, high;
#pragma unroll
    for (int i = 0; i < kVec; ++i) low.at[i] = from_float<T>(lower[i]), high.at[i] = from_float<T>(upper[i]);
    T* const at = static_cast<T*>(to.data) + page * to.stride_n + head * to.stride_h + vec * kVec;
    *reinterpret_cast<Vec<T>*>(at) = low, *reinterpret_cast<Vec<T>*>(at + to.stride_c) = high;
  }
}

}  // namespace quest::cuda
