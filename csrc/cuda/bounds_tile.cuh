// The bounds of sixteen pages against eight query heads: what estimate and decode_step share, so that their scores have
// the same bits.
#pragma once

#include "byte_rows.cuh"

namespace quest::cuda {

// Query heads r of a tile, as the bounds meet them.
template <class T, class Bound, int D>
struct SplitQuery {
  RowPieces<D, sizeof(Bound) == 1 ? 16 : 8> negative, positive;

  __device__ __forceinline__ void load(const T* row) {
    positive.load(row);
    split();
  }
  // Of what `positive` has.
  __device__ __forceinline__ void split() {
    negative = negative_part<T>(positive);
    positive = positive_part<T>(positive);
  }
};

template <class T, class Bound, int D>
struct BoundsTile {
  using Row = std::conditional_t<sizeof(Bound) == 1, ByteRow<D>, RowPieces<D>>;
  Row lower[2], upper[2];  // of pages r and r + 8
  float scale[2];          // of 8-bit bounds; else 1, or NaN where the scores are to be that

  // Physical page or -1, where zeros are read. The scale is for the caller to set.
  __device__ __forceinline__ void load(int half, const Bounds& bounds, int64_t page, int head) {
    const Bound* const row = static_cast<const Bound*>(bounds.data) + page * bounds.stride_n + head * bounds.stride_h;
    lower[half].load(page < 0 ? nullptr : row);
    upper[half].load(page < 0 ? nullptr : row + bounds.stride_c);
  }

  // In a loop over query heads: what is unpacked for one of them is not kept in registers for the next.
  __device__ __forceinline__ void unpack_anew() {
    if constexpr (sizeof(Bound) == 1)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int i = 0; i < Row::kCount; ++i) {
          uint4 &lo = lower[half].at[i], &hi = upper[half].at[i];
          asm volatile("" : "+r"(lo.x), "+r"(lo.y), "+r"(lo.z), "+r"(lo.w));
          asm volatile("" : "+r"(hi.x), "+r"(hi.y), "+r"(hi.z), "+r"(hi.w));
        }
  }

  // scores[e]: page r + e / 2 * 8, head 2c + e % 2.
  __device__ __forceinline__ void score(float (&scores)[4], const SplitQuery<T, Bound, D>& query) const {
    float acc[4] = {};
    dot<T>(acc, lower[0], lower[1], query.negative);
    dot<T>(acc, upper[0], upper[1], query.positive);
#pragma unroll
    for (int e = 0; e < 4; ++e) scores[e] = acc[e] * scale[e / 2];
  }
};

}  // namespace quest::cuda
