// Mean - factor * std and mean + factor * std of the keys of one page and head, by a block or a warp. This summary is
// that of UNIQUE (2026): one extreme key moves it less than it moves the minimum and maximum.
//
// A thread adds up a pair of dimensions, key after key. So the sums do not depend on the number of threads, and every
// kernel writes the same bits, as does the CPU. The first key is subtracted before squares are summed, which keeps the
// rounding error of the variance small. A key that is not finite makes NaN bounds.
#pragma once

#include "bounds_codes.cuh"

namespace quest::cuda {

template <class T>
__device__ __forceinline__ float2 load_pair(const T* p, bool aligned) {
  struct alignas(2 * sizeof(T)) Pair {
    T x, y;
  };
  if (aligned) {
    const Pair pair = *reinterpret_cast<const Pair*>(p);
    return {to_float(pair.x), to_float(pair.y)};
  }
  return {to_float(p[0]), to_float(p[1])};
}

// Sums of one dimension. No operation is fused, on the CPU either.
struct KeySums {
  float first, sum = 0.f, squares = 0.f;

  __device__ __forceinline__ void add(float key) {
    const float x = __fsub_rn(key, first);
    sum = __fadd_rn(sum, x);
    squares = __fadd_rn(squares, __fmul_rn(x, x));
  }
  __device__ __forceinline__ float2 bounds(float count, float factor) const {
    const float mean = __fadd_rn(first, __fdiv_rn(sum, count));
    const float variance = __fdiv_rn(__fsub_rn(squares, __fdiv_rn(__fmul_rn(sum, sum), count)), count);
    const float width = __fmul_rn(factor, __fsqrt_rn(variance < 0.f ? 0.f : variance));
    return {__fsub_rn(mean, width), __fadd_rn(mean, width)};
  }
};

// kThreads is a warp's, with a Shared for each warp, or a whole block's.
template <class T, int kThreads>
struct PageMeanStd {
  static constexpr int kWarps = kThreads / kWarpSize;
  struct Shared {
    float lower[kMaxHeadDim], upper[kMaxHeadDim], largest[kWarps];
  };

  static __device__ __forceinline__ int thread() {
    return static_cast<int>(kWarps == 1 ? threadIdx.x % kWarpSize : threadIdx.x);
  }

  // From `tokens` >= 1 keys; pair(s, d) gives dimensions d and d + 1 of key s.
  template <class Pair>
  static __device__ __forceinline__ void renew(
      const Bounds& bounds, int64_t page, int head, int D, int tokens, Shared& shared, const Pair& pair) {
    constexpr int kInFlight = 8;  // loads that wait together; more take registers from the loops of decode_step
    float largest = 0.f;
#pragma unroll 1
    for (int d = 2 * thread(); d < D; d += 2 * kThreads) {
      const float2 first = pair(0, d);
      KeySums x{.first = first.x}, y{.first = first.y};
      int s = 0;
#pragma unroll 1
      for (; s + kInFlight <= tokens; s += kInFlight) {
        float2 key[kInFlight];
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) key[i] = pair(s + i, d);
#pragma unroll
        for (int i = 0; i < kInFlight; ++i) x.add(key[i].x), y.add(key[i].y);
      }
#pragma unroll 1
      for (; s < tokens; ++s) {
        const float2 key = pair(s, d);
        x.add(key.x), y.add(key.y);
      }
      const float2 of_x = x.bounds(static_cast<float>(tokens), bounds.std_factor),
                   of_y = y.bounds(static_cast<float>(tokens), bounds.std_factor);
      shared.lower[d] = of_x.x, shared.upper[d] = of_x.y;
      shared.lower[d + 1] = of_y.x, shared.upper[d + 1] = of_y.y;
      largest = nan_max(largest, nan_max(fabsf(of_x.x), fabsf(of_x.y)));
      largest = nan_max(largest, nan_max(fabsf(of_y.x), fabsf(of_y.y)));
    }
    if (bounds.scales) {
      largest = largest_of(largest, shared.largest);
      // A thread writes other dimensions than it has summed.
      if constexpr (kWarps == 1) __syncwarp();
      return store_codes<false, kThreads>(
          bounds, page, head, D, thread(), largest, [&](int d) { return shared.lower[d]; },
          [&](int d) { return shared.upper[d]; });
    }
    T* const to = static_cast<T*>(bounds.data) + page * bounds.stride_n + head * bounds.stride_h;
#pragma unroll 1
    for (int d = 2 * thread(); d < D; d += 2 * kThreads) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        to[d + i] = from_float<T>(shared.lower[d + i]);
        to[d + i + bounds.stride_c] = from_float<T>(shared.upper[d + i]);
      }
    }
  }
};

// As renew_page_bounds in page_bounds.cuh.
template <class T, int kThreads>
__device__ __forceinline__ void renew_page_mean_std(
    const Cache& cache, const Bounds& to, int D, int64_t page, int head, int tokens, const T* newest,
    typename PageMeanStd<T, kThreads>::Shared& shared) {
  const T* const keys = static_cast<const T*>(cache.data) + page * cache.stride_n + head * cache.stride_h;
  PageMeanStd<T, kThreads>::renew(to, page, head, D, tokens, shared, [&](int s, int d) {
    const bool is_newest = newest && s + 1 == tokens;
    return load_pair((is_newest ? newest : keys + s * cache.stride_s) + d, cache.aligned);
  });
}

}  // namespace quest::cuda
