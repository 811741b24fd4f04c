// The loop of rerank_pages: dot products of queries with keys in two bits a dimension.
//
// A tile is R queries by some keys. A query has two sums with a key, of its high and of its low parts: see
// split_rotated in key_codes.h.
#pragma once

#include "vectors.h"

namespace quest::cpu::QUEST_ISA {
namespace {

// The levels of the W elements from d on. They are looked up, so that no integer is converted.
QUEST_INLINE Vec load_levels(const uint8_t* codes, int d) {
#if QUEST_WIDTH == 16
  const __m512i word = _mm512_set1_epi32(load_as<int>(codes + d / 4));
  const __m512i shifts = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512 levels = _mm512_setr_ps(-3, -1, 1, 3, -3, -1, 1, 3, -3, -1, 1, 3, -3, -1, 1, 3);  // of the last 4 bits
  return (Vec)_mm512_maskz_permutexvar_ps(0xffff, _mm512_maskz_srlv_epi32(0xffff, word, shifts), levels);
#elif QUEST_WIDTH == 8
  const __m256i word = _mm256_set1_epi32(load_as<uint16_t>(codes + d / 4));
  const __m256i shifts = _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14);
  const __m256 levels = _mm256_setr_ps(-3, -1, 1, 3, -3, -1, 1, 3);  // of the last 3 bits
  return (Vec)_mm256_permutevar8x32_ps(levels, _mm256_srlv_epi32(word, shifts));
#else
  typedef int32_t Ints __attribute__((vector_size(W * 4)));
  const Ints code = (Ints{} + codes[d / 4]) >> Ints{0, 2, 4, 6} & 3;
  return __builtin_convertvector(2 * code - 3, Vec);
#endif
}

template <int R>
QUEST_INLINE void score_codes_tile(const float* q, const uint8_t* codes, int64_t stride, int n, int D, float* scores) {
  constexpr int kProducts = kSums / 2, N = kProducts / R;
  Vec sums[kSums] = {};
  for (int d = 0; d < D; d += W) {
    Vec high[R], low[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      high[r] = keep(load(q + 2 * r * D + d));
      low[r] = keep(load(q + (2 * r + 1) * D + d));
    }
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      const Vec levels = keep(load_levels(codes + (j < n ? j : 0) * stride, d));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        sums[r * N + j] += high[r] * levels;
        sums[kProducts + r * N + j] += low[r] * levels;
      }
    }
  }
  float both[kSums];
  sum_lanes(sums, both);
  for (int i = 0; i < kProducts; ++i) scores[i] = both[i] + both[kProducts + i];
}

void score_codes(
    const float* q, int queries, const uint8_t* codes, int64_t stride, const float* scales, int64_t scales_stride,
    int n, int D, float* out, int64_t out_stride) {
  const auto tiles = [&]<int R>(int r) __attribute__((always_inline)) {
    constexpr int N = kSums / 2 / R;
    for (int j = 0; j < n; j += N) {
      float scores[kSums / 2];
      score_codes_tile<R>(q + 2 * r * D, codes + j * stride, stride, n - j, D, scores);
      for (int i = 0; i < R; ++i)
        for (int k = 0; k < min(N, n - j); ++k)
          out[(r + i) * out_stride + j + k] = scores[i * N + k] * scales[(j + k) * scales_stride];
    }
  };
  tile_queries(queries, tiles);
}

}  // namespace
}  // namespace quest::cpu::QUEST_ISA
