// Bounds of 8 or 4 bits: whole numbers times the page's scale, its largest magnitude / 127 or / 7 rounded up. The CPU
// computes the same numbers bit for bit.
#pragma once

#include "../core/elements.cuh"

namespace quest::cuda {

// Two numbers of 4 bits a byte. Each is stored plus 8, the even dimension in the low half.
struct Nibbles {
  uint8_t bits;
};

template <class Bound>
constexpr bool kHasScales = sizeof(Bound) == 1;
template <class Bound, int D>
constexpr int kBoundsRowBytes = std::is_same_v<Bound, Nibbles> ? D / 2 : D * static_cast<int>(sizeof(Bound));

// The largest of the threads' magnitudes. NaN wins. By all threads of a warp or block.
template <int kWarps>
__device__ __forceinline__ float largest_of(float x, float (&by_warp)[kWarps]) {
#pragma unroll
  for (int step = 1; step < kWarpSize; step *= 2) x = nan_max(x, __shfl_xor_sync(kFullMask, x, step));
  if constexpr (kWarps == 1) return x;
  if (threadIdx.x % kWarpSize == 0) by_warp[threadIdx.x / kWarpSize] = x;
  __syncthreads();
  x = 0.f;
  for (int w = 0; w < kWarps; ++w) x = nan_max(x, by_warp[w]);
  return x;
}

// Directed division rounds minimum and maximum outward, so that they stay bounds. Others are rounded to the nearest.
template <bool kOutward>
struct BoundCode {
  float scale;
  bool finite;  // else zeros: scores are 0, or NaN as the scale is

  __device__ __forceinline__ int lower(float x) const {
    return !finite ? 0 : static_cast<int>(kOutward ? floorf(__fdiv_rd(x, scale)) : rintf(__fdiv_rn(x, scale)));
  }
  __device__ __forceinline__ int upper(float x) const {
    return !finite ? 0 : static_cast<int>(kOutward ? ceilf(__fdiv_ru(x, scale)) : rintf(__fdiv_rn(x, scale)));
  }
};

// Writes a page's codes and scale, by all kThreads, since a division takes long. `largest`: the page's largest
// magnitude. lower(d) and upper(d): the float bounds.
template <bool kOutward, int kThreads, class Lower, class Upper>
__device__ __forceinline__ void store_codes(
    const Bounds& bounds, int64_t page, int head, int D, int thread, float largest, const Lower& lower,
    const Upper& upper) {
  const float scale = __fdiv_ru(largest, bounds.packed ? 7.f : 127.f);
  const BoundCode<kOutward> code{scale, scale > 0.f && scale < INFINITY};
  int8_t* const to = static_cast<int8_t*>(bounds.data) + page * bounds.stride_n + head * bounds.stride_h;
  if (bounds.packed) {
    const auto pack = [](int even, int odd) { return static_cast<int8_t>((even + 8) | (odd + 8) << 4); };
#pragma unroll 1
    for (int d = 2 * thread; d < D; d += 2 * kThreads) {
      to[d / 2] = pack(code.lower(lower(d)), code.lower(lower(d + 1)));
      to[d / 2 + bounds.stride_c] = pack(code.upper(upper(d)), code.upper(upper(d + 1)));
    }
  } else {
    for (int d = thread; d < D; d += kThreads) {
      to[d] = static_cast<int8_t>(code.lower(lower(d)));
      to[d + bounds.stride_c] = static_cast<int8_t>(code.upper(upper(d)));
    }
  }
  if (thread == 0) bounds.scales[page * bounds.scales_stride_n + head * bounds.scales_stride_h] = scale;
}

}  // namespace quest::cuda
