// The bounds of one page and head from its first n >= 1 keys, for append_kv and update_bounds.
#pragma once

#include <cmath>
#include <limits>

#include "elements.h"
#include "simd/loops.h"

namespace quest::cpu {

// 8-bit bounds: multiples of the page's scale, rounded outward so that they stay bounds. The scale is the largest
// magnitude / 127, rounded up. Products are exact in double, so the CUDA kernels' directed rounding gives the same
// bits.
inline void store_int8(const float* lower, const float* upper, int D, int8_t* low, int8_t* high, float& scale) {
  float largest = 0;
  for (int d = 0; d < D; ++d)
    for (const float x : {std::fabs(lower[d]), std::fabs(upper[d])})
      if (!(x <= largest)) largest = std::isnan(largest) ? largest : x;
  scale = largest / 127;
  if (double{scale} * 127 < largest) scale = std::nextafterf(scale, std::numeric_limits<float>::infinity());
  const bool some = scale > 0 && std::isfinite(scale);  // else zeros: then scores are 0 times the scale
  for (int d = 0; d < D; ++d) {
    double below = some ? std::floor(double{lower[d]} / scale) : 0,
           above = some ? std::ceil(double{upper[d]} / scale) : 0;
    if (below * scale > lower[d]) --below;
    if (above * scale < upper[d]) ++above;
    low[d] = static_cast<int8_t>(below), high[d] = static_cast<int8_t>(above);
  }
}

inline void renew_page_bounds(
    const Loops& loops, const Cache& k, const Bounds& bounds, DType dtype, int64_t page, int h, int n, int D) {
  const int type = dtype_index(dtype);
  float lower[kMaxHeadDim], upper[kMaxHeadDim];
  loops.bounds[type](element(k.data, page * k.stride_n + h * k.stride_h, dtype), k.stride_s, n, D, lower, upper);
  const int64_t offset = page * bounds.stride_n + h * bounds.stride_h;
  if (bounds.scales) {
    int8_t* const low = static_cast<int8_t*>(bounds.data) + offset;
    float& scale = bounds.scales[page * bounds.scales_stride_n + h * bounds.scales_stride_h];
    return store_int8(lower, upper, D, low, low + bounds.stride_c, scale);
  }
  loops.store[type](lower, D, element(bounds.data, offset, dtype));
  loops.store[type](upper, D, element(bounds.data, offset + bounds.stride_c, dtype));
}

}  // namespace quest::cpu
