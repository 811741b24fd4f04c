// The elementwise minimum and maximum of the keys of one page and head, by a block or a warp. A NaN key makes NaN
// bounds, so that a broken page shows and is not skipped.
//
// The CPU computes the same numbers bit for bit.
#pragma once

#include "bounds_codes.cuh"

namespace quest::cuda {

constexpr int kBoundsThreads = 128;  // of the kernels that give a page to a block

// kThreads is a warp's, with a Shared for each warp, or a whole block's.
template <class T, int kThreads>
struct PageBounds {
  static constexpr int kVec = Vec<T>::kSize, kWarps = kThreads / kWarpSize;
  struct Shared {
    Vec<T> lower[kThreads], upper[kThreads];
    float largest[kWarps];
  };

  int vecs, rows, vec, row;  // a row of threads covers head_dim once; rows take turns with the keys
  bool active, has_key = false;
  float lower[kVec], upper[kVec];

  __device__ explicit PageBounds(int D) {
    vecs = D / kVec;
    rows = kThreads / vecs;
    vec = thread() % vecs;
    row = thread() / vecs;
    active = row < rows;
#pragma unroll
    for (int i = 0; i < kVec; ++i) lower[i] = INFINITY, upper[i] = -INFINITY;
  }

  // Unsigned, since the constructor divides it, and a signed division takes longer.
  static __device__ __forceinline__ unsigned thread() { return kWarps == 1 ? threadIdx.x % kWarpSize : threadIdx.x; }
  static __device__ __forceinline__ void sync() { kWarps == 1 ? __syncwarp() : __syncthreads(); }

  __device__ __forceinline__ int offset() const { return vec * kVec; }

  __device__ __forceinline__ void add(const Vec<T>& key) {
    has_key = true;
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const float x = to_float(key.at[i]);
      lower[i] = nan_min(lower[i], x);
      upper[i] = nan_max(upper[i], x);
    }
  }

  // By all kThreads; those that are not active have added nothing.
  __device__ __forceinline__ void store(const Bounds& bounds, int64_t page, int head, Shared& shared) {
    float largest = 0.f;
    Vec<T> low, high;
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      low.at[i] = from_float<T>(lower[i]), high.at[i] = from_float<T>(upper[i]);
      if (has_key) largest = nan_max(largest, nan_max(fabsf(lower[i]), fabsf(upper[i])));
    }
    shared.lower[thread()] = low, shared.upper[thread()] = high;
    if (bounds.scales) {
#pragma unroll
      for (int step = 1; step < kWarpSize; step *= 2)
        largest = nan_max(largest, __shfl_xor_sync(kFullMask, largest, step));
      if (thread() % kWarpSize == 0) shared.largest[thread() / kWarpSize] = largest;
    }
    sync();
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
      sync();
      largest = 0.f;
      for (int w = 0; w < kWarps; ++w) largest = nan_max(largest, shared.largest[w]);
      store_codes<true, kThreads>(
          bounds, page, head, vecs * kVec, static_cast<int>(thread()), largest,
          [&](int d) { return to_float(shared.lower[d / kVec].at[d % kVec]); },
          [&](int d) { return to_float(shared.upper[d / kVec].at[d % kVec]); });
    } else if (row == 0) {
      T* const to = static_cast<T*>(bounds.data) + page * bounds.stride_n + head * bounds.stride_h + offset();
      store_vec(to, low, bounds.aligned);
      store_vec(to + bounds.stride_c, high, bounds.aligned);
    }
  }
};

// The bounds of a page from the first `tokens` keys in it. `newest`, if given, is the last of them, which need not be
// in the cache yet; it is as aligned as the cache.
template <class T, int kThreads>
__device__ __forceinline__ void renew_page_bounds(
    const Cache& cache, const Bounds& to, int D, int64_t page, int head, int tokens, const T* newest,
    typename PageBounds<T, kThreads>::Shared& shared) {
  PageBounds<T, kThreads> bounds(D);
  const T* const keys =
      static_cast<const T*>(cache.data) + page * cache.stride_n + head * cache.stride_h + bounds.offset();
  const auto load = [&](int s) {
    const bool is_newest = newest && s + 1 == tokens;
    return load_vec(is_newest ? newest + bounds.offset() : keys + s * cache.stride_s, cache.aligned);
  };
  constexpr int kInFlight = 4;  // loads that wait together
  int s = bounds.active ? bounds.row : tokens;
#pragma unroll 1
  for (; s + (kInFlight - 1) * bounds.rows < tokens; s += kInFlight * bounds.rows) {
    Vec<T> key[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) key[i] = load(s + i * bounds.rows);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) bounds.add(key[i]);
  }
#pragma unroll 1
  for (; s < tokens; s += bounds.rows) bounds.add(load(s));
  bounds.store(to, page, head, shared);
}

}  // namespace quest::cuda
