// The bounds of sixteen pages against eight query heads. estimate and decode_step share it, so that their scores have
// the same bits.
#pragma once

#include "code_rows.cuh"

namespace quest::cuda {

// The query heads of a tile: min(q, 0) meets the lower bounds, max(q, 0) the upper.
template <class T, class Bound, int D>
struct SignedQuery {
  RowPieces<D, kHasScales<Bound> ? 16 : 8> negative, positive;

  __device__ __forceinline__ void load(const T* row) {
    positive.load(row);
    split();
  }
  // Of the query that `positive` holds.
  __device__ __forceinline__ void split() {
    if constexpr (std::is_same_v<Bound, Nibbles>)
#pragma unroll
      for (int i = 0; i < decltype(positive)::kCount; ++i) positive.at[i] = order_as_nibbles(positive.at[i]);
    negative = negative_part<T>(positive);
    positive = positive_part<T>(positive);
  }
};

template <class T, class Bound, int D>
struct PageScoreTile {
  using Row = std::conditional_t<
      std::is_same_v<Bound, Nibbles>, NibbleRow<D>,
      std::conditional_t<std::is_same_v<Bound, int8_t>, Int8Row<D>, RowPieces<D>>>;
  Row lower[2], upper[2];  // of pages r and r + 8
  float scale[2];          // of 8-bit and 4-bit bounds; else 1, or NaN to make the scores NaN

  // page: physical, or -1, which reads as zeros. The caller sets the scale.
  __device__ __forceinline__ void load(int half, const Bounds& bounds, int64_t page, int head) {
    const Bound* const row = static_cast<const Bound*>(bounds.data) + page * bounds.stride_n + head * bounds.stride_h;
    lower[half].load(page < 0 ? nullptr : row);
    upper[half].load(page < 0 ? nullptr : row + bounds.stride_c);
  }

  // Keeps the compiler from holding unpacked bounds in registers between the query heads of a loop.
  __device__ __forceinline__ void unpack_anew() {
    if constexpr (kHasScales<Bound>)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int i = 0; i < Row::kCount; ++i) forget_origin(lower[half].at[i]), forget_origin(upper[half].at[i]);
  }

  // scores[e]: page r + e / 2 * 8, head 2c + e % 2.
  __device__ __forceinline__ void score(float (&scores)[4], const SignedQuery<T, Bound, D>& query) const {
    float acc[4] = {};
    dot<T>(acc, lower[0], lower[1], query.negative);
    dot<T>(acc, upper[0], upper[1], query.positive);
#pragma unroll
    for (int e = 0; e < 4; ++e) scores[e] = acc[e] * scale[e / 2];
  }
};

}  // namespace quest::cuda
