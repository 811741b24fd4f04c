// The bounds of one page and head from its first n >= 1 keys, for append_kv and update_bounds.
#pragma once

#include <array>
#include <cmath>
#include <limits>

#include "elements.h"
#include "simd/loops.h"

namespace quest::cpu {

// Whole numbers `codes` of [lower, upper] as int8, or two of 4 bits a byte: plus 8, the even dimension low.
inline void store_codes(const std::array<const int8_t*, 2>& codes, int D, const Bounds& bounds, int64_t offset) {
  int8_t* row = static_cast<int8_t*>(bounds.data) + offset;
  for (const int8_t* code : codes) {
    if (bounds.packed)
      for (int d = 0; d < D; d += 2) row[d / 2] = static_cast<int8_t>((code[d] + 8) | (code[d + 1] + 8) << 4);
    else
      std::copy_n(code, D, row);
    row += bounds.stride_c;
  }
}

// Bounds of 8 or 4 bits: multiples of the page's scale, its largest magnitude / 127 or / 7 rounded up. Minimum and
// maximum are rounded outward, so that they stay bounds, and others to the nearest. Products are exact in double, so
// the CUDA kernels' directed rounding gives the same bits.
inline void store_scaled(
    const float* lower, const float* upper, int D, const Bounds& bounds, int64_t offset, float& scale) {
  const int most = bounds.packed ? 7 : 127;
  float largest = 0;
  for (int d = 0; d < D; ++d)
    for (const float x : {std::fabs(lower[d]), std::fabs(upper[d])})
      if (!(x <= largest)) largest = std::isnan(largest) ? largest : x;
  scale = largest / static_cast<float>(most);
  if (double{scale} * most < largest) scale = std::nextafterf(scale, std::numeric_limits<float>::infinity());
  const bool some = scale > 0 && std::isfinite(scale);  // else zeros: then scores are 0 times the scale
  int8_t low[kMaxHeadDim], high[kMaxHeadDim];
  for (int d = 0; d < D; ++d) {
    double below = 0, above = 0;
    if (some && bounds.mean_std) {
      below = std::nearbyintf(lower[d] / scale), above = std::nearbyintf(upper[d] / scale);
    } else if (some) {
      below = std::floor(double{lower[d]} / scale), above = std::ceil(double{upper[d]} / scale);
      if (below * scale > lower[d]) --below;
      if (above * scale < upper[d]) ++above;
    }
    low[d] = static_cast<int8_t>(below), high[d] = static_cast<int8_t>(above);
  }
  store_codes({low, high}, D, bounds, offset);
}

// Mean - factor * std and mean + factor * std of n keys. The sums and their order are those of the CUDA kernels
// (cuda/tile/page_mean_std.cuh), and so are the bits.
inline void mean_std(
    const Loops& loops, const void* keys, int64_t stride, DType dtype, int n, int D, float factor, float* lower,
    float* upper) {
  float first[kMaxHeadDim], key[kMaxHeadDim], sum[kMaxHeadDim] = {}, squares[kMaxHeadDim] = {};
  const auto load = loops.load[dtype_index(dtype)];
  load(keys, D, first);
  for (int s = 0; s < n; ++s) {
    load(element(keys, s * stride, dtype), D, key);
    for (int d = 0; d < D; ++d) {
      const float x = key[d] - first[d];
      sum[d] += x;
      squares[d] += x * x;
    }
  }
  const float count = static_cast<float>(n);
  for (int d = 0; d < D; ++d) {
    const float mean = first[d] + sum[d] / count;
    const float variance = (squares[d] - sum[d] * sum[d] / count) / count;
    const float width = factor * std::sqrt(variance < 0 ? 0 : variance);
    lower[d] = mean - width, upper[d] = mean + width;
  }
}

inline void renew_page_bounds(
    const Loops& loops, const Cache& k, const Bounds& bounds, DType dtype, int64_t page, int h, int n, int D) {
  const int type = dtype_index(dtype);
  float lower[kMaxHeadDim], upper[kMaxHeadDim];
  const std::byte* const keys = element(k.data, page * k.stride_n + h * k.stride_h, dtype);
  if (bounds.mean_std)
    mean_std(loops, keys, k.stride_s, dtype, n, D, bounds.std_factor, lower, upper);
  else
    loops.bounds[type](keys, k.stride_s, n, D, lower, upper);
  const int64_t offset = page * bounds.stride_n + h * bounds.stride_h;
  if (bounds.scales) {
    float& scale = bounds.scales[page * bounds.scales_stride_n + h * bounds.scales_stride_h];
    if (bounds.packed || bounds.mean_std) return store_scaled(lower, upper, D, bounds, offset, scale);
    int8_t* const low = static_cast<int8_t*>(bounds.data) + offset;
    return loops.store_int8(lower, upper, D, low, low + bounds.stride_c, &scale);
  }
  loops.store[type](lower, D, element(bounds.data, offset, dtype));
  loops.store[type](upper, D, element(bounds.data, offset + bounds.stride_c, dtype));
}

}  // namespace quest::cpu
