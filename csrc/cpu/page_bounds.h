// The bounds of one page and head from its first n >= 1 keys: the part that append_kv and update_bounds share.
#pragma once

#include "elements.h"
#include "simd/loops.h"

namespace quest::cpu {

inline void renew_page_bounds(const Cache& k, const Bounds& bounds, DType dtype, int64_t page, int h, int n, int D) {
  const Loops& loop = loops();
  const int type = dtype_index(dtype);
  float lower[kMaxHeadDim], upper[kMaxHeadDim];
  loop.bounds[type](element(k.data, page * k.stride_n + h * k.stride_h, dtype), k.stride_s, n, D, lower, upper);
  const int64_t offset = page * bounds.stride_n + h * bounds.stride_h;
  loop.store[type](lower, D, element(bounds.data, offset, dtype));
  loop.store[type](upper, D, element(bounds.data, offset + bounds.stride_c, dtype));
}

}  // namespace quest::cpu
