// The loop of estimate: q- . lower + q+ . upper for pages, q- and q+ being the negative and positive parts of a query.
//
// A tile is R queries by kSums / R pages, and every sum stays in a register. AVX-512-VNNI multiplies the bytes of 8-bit
// bounds as they are. A query's scores are the same in every tile.
#pragma once

#include "vectors.h"

namespace quest::cpu::QUEST_ISA {
namespace {

// ---- Kinds of stored bounds. A kind gives the W bounds of a row from d on, and in bytes 64 of them for VNNI.

template <class E>
struct PlainBounds {
  QUEST_INLINE Vec load(const void* row, int d) { return E::load(static_cast<const typename E::Storage*>(row) + d); }
};

struct Int8Bounds {
  QUEST_INLINE Vec load(const void* row, int d) {
    const auto* p = static_cast<const int8_t*>(row) + d;
#if QUEST_WIDTH == 16
    return (Vec)_mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, load_as<__m128i>(p)));
#elif QUEST_WIDTH == 8
    return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    typedef int8_t Bytes __attribute__((vector_size(W)));
    return __builtin_convertvector(load_as<Bytes>(p), Vec);
#endif
  }
#if QUEST_VNNI
  QUEST_INLINE __m512i bytes(const void* row, int d, __mmask64 mask) {
    return _mm512_maskz_loadu_epi8(mask, static_cast<const int8_t*>(row) + d);
  }
#endif
};

// ---- Queries by float32: their negative parts [D], then their positive parts [D]. NaN is in both.

QUEST_INLINE const float* parts_of(const void* queries, int64_t stride, int r) {
  return reinterpret_cast<const float*>(static_cast<const char*>(queries) + r * stride);
}

QUEST_INLINE void split_signs(const float* q, int D, float* parts) {
  for (int d = 0; d < D; d += W) {
    const Vec x = load(q + d), zero = {};
    store(parts + d, x > 0.0f ? zero : x);
    store(parts + D + d, x < 0.0f ? zero : x);
  }
}

template <class B, int R>
QUEST_INLINE void score_tile(
    const void* queries, int64_t stride, const void* const* lower, const void* const* upper, int n, int D,
    float* scores) {
  constexpr int N = kSums / R;
  Vec sums[kSums] = {};
  for (int d = 0; d < D; d += W) {
    Vec negative[R], positive[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const float* const parts = parts_of(queries, stride, r);
      negative[r] = keep(load(parts + d)), positive[r] = keep(load(parts + D + d));
    }
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) {
      const int page = j < n ? j : 0;
      const Vec low = keep(B::load(lower[page], d)), high = keep(B::load(upper[page], d));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sums[r * N + j] += negative[r] * low;
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sums[r * N + j] += positive[r] * high;
    }
  }
  sum_lanes(sums, scores);
}

#if QUEST_VNNI

// ---- Queries by VNNI, which multiplies unsigned by signed bytes and sums exactly in int32.
//
// The magnitude of each element is a 24-bit integer, in units of the last place of the query's largest element. It is
// kept as three bytes, its digits. So an element is off by half a unit at most, and nothing else is rounded before the
// end. A digit of a positive element multiplies the upper bound. That of a negative element multiplies ~lower = -lower
// - 1, and the digits of the negative elements, summed, make up for the 1.

constexpr int kMaxChunks = 4;  // 256 elements

struct Chunk {            // 64 elements
  uint8_t negative[64];   // all bits set where an element is negative
  uint8_t digits[3][64];  // the most significant first; zero past the head dimension
};

struct Digits {
  int32_t start[3][16];  // of the accumulators: the sums of the digits of negative elements
  float unit;
  int finite;  // NaN and infinite queries are scored in float32
  int32_t padding[14];
  Chunk chunks[kMaxChunks];
};

QUEST_INLINE const Digits& digits_of(const void* queries, int64_t stride, int r, int D) {
  return *reinterpret_cast<const Digits*>(static_cast<const char*>(queries) + r * stride + 2 * D * sizeof(float));
}

QUEST_INLINE void split_digits(const float* q, int D, Digits& out) {
  __m512 largest = {};
  for (int d = 0; d < D; d += W) {
    const __m512 magnitude = (__m512)floats(bits(load(q + d)) & 0x7fffffff);
    largest = (__m512)nan_max((Vec)largest, (Vec)magnitude);
  }
  const float most = max_lane((Vec)largest);
  out.finite = most < kInf;
  if (!out.finite) return;
  // most < 2^(exponent + 1), and a denormal number has the exponent of the smallest normal one.
  const int biased = static_cast<int>(__builtin_bit_cast(uint32_t, most) >> 23), exponent = (biased ? biased : 1) - 127;
  const __m512 shift = (__m512)splat(static_cast<float>(23 - exponent));
  out.unit = _mm_cvtss_f32(_mm_scalef_ss(_mm_set_ss(1), _mm_set_ss(static_cast<float>(exponent - 23))));
  __m512i start[3] = {};
  if (D % 64) __builtin_memset(&out.chunks[D / 64], 0, sizeof out.chunks[0]);
  for (int d = 0; d < D; d += W) {
    const __m512 x = (__m512)load(q + d);
    const __m512i magnitude = _mm512_maskz_cvt_roundps_epi32(
        0xffff, _mm512_maskz_scalef_ps(0xffff, (__m512)floats(bits((Vec)x) & 0x7fffffff), shift),
        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __mmask16 negative = _mm512_movepi32_mask((__m512i)x);
    Chunk& chunk = out.chunks[d / 64];
    store_as(chunk.negative + d % 64, _mm_movm_epi8(negative));
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
      const __m512i digit = _mm512_maskz_srli_epi32(0xffff, magnitude, 16 - 8 * i) & (__m512i)(Bits{} + 0xff);
      store_as(chunk.digits[i] + d % 64, _mm512_maskz_cvtepi32_epi8(0xffff, digit));
      start[i] = _mm512_mask_add_epi32(start[i], negative, start[i], digit);
    }
  }
  for (int i = 0; i < 3; ++i) store_as(out.start[i], start[i]);
}

// The sums of the two lower digits fit in int32 together: 256 elements of at most 128 * 65535.
template <class B, int R>
QUEST_INLINE void score_tile_bytes(
    const void* queries, int64_t stride, const void* const* lower, const void* const* upper, int n, int D,
    float* scores) {
  constexpr int N = 8 / R;
  __m512i sums[3][8];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 3
    for (int i = 0; i < 3; ++i) {
      const __m512i start = load_as<__m512i>(digits_of(queries, stride, r, D).start[i]);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) sums[i][r * N + j] = start;
    }
  for (int d = 0; d < D; d += 64) {
    const __mmask64 mask = D - d < 64 ? (uint64_t{1} << (D - d)) - 1 : ~uint64_t{0};
    __m512i low[N], high[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      const int page = j < n ? j : 0;
      low[j] = B::bytes(lower[page], d, mask), high[j] = B::bytes(upper[page], d, mask);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Chunk& chunk = digits_of(queries, stride, r, D).chunks[d / 64];
      const __m512i negative = load_as<__m512i>(chunk.negative);
      __m512i bound[N];
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j)  // negative ? ~low : high
        bound[j] = _mm512_ternarylogic_epi32(negative, low[j], high[j], 0x3a);
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) {
        const __m512i digit = load_as<__m512i>(chunk.digits[i]);
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) sums[i][r * N + j] = _mm512_dpbusd_epi32(sums[i][r * N + j], digit, bound[j]);
      }
    }
  }
  __m512i both[16];  // of the upper digit, then of the two lower ones
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    both[i] = sums[0][i];
    both[8 + i] = add(_mm512_maskz_slli_epi32(0xffff, sums[1][i], 8), sums[2][i]);
  }
  float totals[16];
  store(totals, (Vec)_mm512_maskz_cvtepi32_ps(0xffff, sum_lanes(both)));
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < N; ++j)
      scores[r * N + j] = (totals[r * N + j] * 65536 + totals[8 + r * N + j]) * digits_of(queries, stride, r, D).unit;
}

#endif

// ---- Both.

int64_t query_bytes(int D) {
#if QUEST_VNNI
  return 2 * D * sizeof(float) + sizeof(Digits);
#else
  return 2 * D * sizeof(float);
#endif
}

void split_query(const float* q, int D, void* parts) {
  split_signs(q, D, static_cast<float*>(parts));
#if QUEST_VNNI
  split_digits(q, D, *reinterpret_cast<Digits*>(static_cast<char*>(parts) + 2 * D * sizeof(float)));
#endif
}

template <class B, int R, class Tile>
QUEST_INLINE void score_queries(
    const void* const* lower, const void* const* upper, const float* scales, int n, int N, float* out,
    int64_t out_stride, const Tile& tile) {
  for (int j = 0; j < n; j += N) {
    float scores[kSums];
    tile(lower + j, upper + j, n - j, scores);
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < min(N, n - j); ++i)
        out[r * out_stride + j + i] = scales ? scores[r * N + i] * scales[j + i] : scores[r * N + i];
  }
}

template <class B>
void score(
    const void* queries, int count, const void* const* lower, const void* const* upper, const float* scales, int n,
    int D, float* out, int64_t out_stride) {
  const int64_t stride = query_bytes(D);
  int r = 0;
  const auto tiles = [&]<int R>() __attribute__((always_inline)) {
    const void* const tile_queries = static_cast<const char*>(queries) + r * stride;
    float* const to = out + r * out_stride;
    const auto by_float = [&](auto low, auto high, int pages, float* scores) __attribute__((always_inline)) {
      score_tile<B, R>(tile_queries, stride, low, high, pages, D, scores);
    };
#if QUEST_VNNI
    if constexpr (requires { B::bytes(queries, 0, 0); }) {
      const auto by_bytes = [&](auto low, auto high, int pages, float* scores) __attribute__((always_inline)) {
        score_tile_bytes<B, R>(tile_queries, stride, low, high, pages, D, scores);
      };
      bool finite = true;
      for (int i = 0; i < R; ++i) finite &= digits_of(tile_queries, stride, i, D).finite != 0;
      if (finite) score_queries<B, R>(lower, upper, scales, n, 8 / R, to, out_stride, by_bytes);
      if (finite || R > 1) {
        r += finite ? R : 0;
        return finite;
      }
    }
#endif
    score_queries<B, R>(lower, upper, scales, n, kSums / R, to, out_stride, by_float);
    r += R;
    return true;
  };
  while (r < count) {
    if (r + 4 <= count && tiles.template operator()<4>()) continue;
    if (r + 2 <= count && tiles.template operator()<2>()) continue;
    tiles.template operator()<1>();
  }
}

}  // namespace
}  // namespace quest::cpu::QUEST_ISA
