// The bounds of one page and head from its first n >= 1 keys, for append_kv and update_bounds.
#pragma once

#include "elements.h"
#include "simd/loops.h"

namespace quest::cpu {

inline void renew_page_bounds(
    const Loops& loops, const Cache& k, const Bounds& bounds, DType dtype, int64_t page, int h, int n, int D) {
  const int type = dtype_index(dtype);
  float lower[kMaxHeadDim], upper[kMaxHeadDim];
  loops.bounds[type](element(k.data, page * k.stride_n + h * k.stride_h, dtype), k.stride_s, n, D, lower, upper);
  const int64_t offset = page * bounds.stride_n + h * bounds.stride_h;
  if (bounds.scales) {
    int8_t* const low = static_cast<int8_t*>(bounds.data) + offset;
    float& scale = bounds.scales[page * bounds.scales_stride_n + h * bounds.scales_stride_h];
    return loops.store_int8(lower, upper, D, low, low + bounds.stride_c, &scale);
  }
  loops.store[type](lower, D, element(bounds.data, offset, dtype));
  loops.store[type](upper, D, element(bounds.data, offset + bounds.stride_c, dtype));
}

}  // namespace quest::cpu
