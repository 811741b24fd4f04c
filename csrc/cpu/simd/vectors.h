// The compiler's vector types, and the elements that become vectors of float32. QUEST_WIDTH is the floats of a vector.
//
// Explicit vectors fix the order of every sum, as `omp simd` reductions would not.
#pragma once

#include "loops.h"

#if QUEST_WIDTH > 4
#include <immintrin.h>
#endif

namespace quest::cpu::QUEST_ISA {
namespace {

constexpr int W = QUEST_WIDTH;

typedef float Vec __attribute__((vector_size(W * 4)));
typedef uint32_t Bits __attribute__((vector_size(W * 4)));
typedef uint16_t Halves __attribute__((vector_size(W * 2)));
typedef float Vec4 __attribute__((vector_size(16)));

#define QUEST_INLINE static inline __attribute__((always_inline))

template <class V, class T>
QUEST_INLINE V load_as(const T* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T>
QUEST_INLINE void store_as(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}
QUEST_INLINE Vec load(const float* p) { return load_as<Vec>(p); }
// For a vector that several instructions use. GCC would load it again in each, and loads are the bottleneck.
QUEST_INLINE Vec keep(Vec v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#endif
  return v;
}
QUEST_INLINE void store(float* p, Vec v) { store_as(p, v); }
QUEST_INLINE Vec splat(float x) { return x - Vec{}; }
QUEST_INLINE Bits bits(Vec v) { return (Bits)v; }
QUEST_INLINE Vec floats(Bits b) { return (Vec)b; }

// Compilers emit three instructions for the conversion where the processor has one.
QUEST_INLINE Bits widen(Halves h) {
#if QUEST_WIDTH == 16
  return (Bits)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)h);
#elif QUEST_WIDTH == 8
  return (Bits)_mm256_cvtepu16_epi32((__m128i)h);
#else
  return __builtin_convertvector(h, Bits);
#endif
}

constexpr float kInf = __builtin_inff();

constexpr int min(int a, int b) { return a < b ? a : b; }

// ---- Elements. Conversions are exact or round to nearest even, in every denormal mode of the processor.
//
// load_pair and store_pair convert 2W elements at once, in an order of their own. BF16 puts even elements in the first
// vector and odd ones in the second, by half the instructions of `load`. Sums over tokens keep that order.

struct F32 {
  using Storage = float;
  QUEST_INLINE Vec load(const float* p) { return load_as<Vec>(p); }
  QUEST_INLINE void store(float* p, Vec v) { store_as(p, v); }
  QUEST_INLINE void load_pair(const float* p, Vec& a, Vec& b) { a = load(p), b = load(p + W); }
  QUEST_INLINE void store_pair(float* p, Vec a, Vec b) { store(p, a), store(p + W, b); }
};

struct BF16 {
  using Storage = uint16_t;
  QUEST_INLINE Vec load(const uint16_t* p) { return floats(widen(load_as<Halves>(p)) << 16); }
  QUEST_INLINE void load_pair(const uint16_t* p, Vec& a, Vec& b) {
    const Bits both = bits(keep(load_as<Vec>(p)));
    a = floats(both << 16), b = floats(both & 0xffff0000);
  }
  // In the upper half of each lane.
  QUEST_INLINE Bits round(Vec v) {
    const Bits b = bits(v);
    return v != v ? b | 0x400000 : b + 0x7fff + ((b >> 16) & 1);
  }
  QUEST_INLINE void store(uint16_t* p, Vec v) { store_as(p, __builtin_convertvector(round(v) >> 16, Halves)); }
  QUEST_INLINE void store_pair(uint16_t* p, Vec a, Vec b) { store_as(p, (round(a) >> 16) | (round(b) & 0xffff0000)); }
};

struct F16 {
  using Storage = uint16_t;
  QUEST_INLINE Vec load(const uint16_t* p) {
#if QUEST_WIDTH == 16
    return (Vec)_mm512_maskz_cvtph_ps(0xffff, (__m256i)load_as<Halves>(p));
#elif QUEST_WIDTH == 8
    return (Vec)_mm256_cvtph_ps((__m128i)load_as<Halves>(p));
#else
    const Bits h = widen(load_as<Halves>(p));
    const Bits sign = (h & 0x8000) << 16, magnitude = (h & 0x7fff) << 13, exponent = magnitude & 0x0f800000;
    const Bits normal = magnitude + ((127 - 15) << 23);
    const Bits special = normal + ((128 - 16) << 23);
    // A denormal half is the fraction of a float, less its leading one.
    const Bits denormal = bits(floats(normal + (1 << 23)) - floats(Bits{} + (113u << 23)));
    return floats((exponent == 0x0f800000 ? special : exponent == 0 ? denormal : normal) | sign);
#endif
  }
  QUEST_INLINE void store(uint16_t* p, Vec v) {
#if QUEST_WIDTH == 16
    store_as(p, _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif QUEST_WIDTH == 8
    store_as(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
    const Bits sign = (bits(v) >> 16) & 0x8000, magnitude = bits(v) & 0x7fffffff;
    const Bits nan = ((magnitude >> 13) & 0x3ff) | 0x7e00, infinite = Bits{} + 0x7c00;
    const Bits normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    // Adding 0.5 rounds the fraction of a denormal half into the last bits.
    const Bits denormal = bits(floats(magnitude) + 0.5f) - 0x3f000000;
    const Bits finite = magnitude < 0x38800000 ? denormal : normal;
    const Bits half = magnitude > 0x7f800000 ? nan : magnitude >= 0x47800000 ? infinite : finite;
    store_as(p, __builtin_convertvector(half | sign, Halves));
#endif
  }
  QUEST_INLINE void load_pair(const uint16_t* p, Vec& a, Vec& b) { a = load(p), b = load(p + W); }
  QUEST_INLINE void store_pair(uint16_t* p, Vec a, Vec b) { store(p, a), store(p + W, b); }
};

QUEST_INLINE Vec nan_max(Vec a, Vec b) { return ((b > a) | (b != b)) ? b : a; }

QUEST_INLINE float max_lane(Vec v) {
  float result = v[0];
  for (int lane = 1; lane < W; ++lane) result = v[lane] > result || v[lane] != v[lane] ? v[lane] : result;
  return result;
}

// tile.operator()<R>(r) for R queries from r on, R being 4, 2 or 1.
template <class Tile>
QUEST_INLINE void tile_queries(int queries, const Tile& tile) {
  int r = 0;
  for (; r + 4 <= queries; r += 4) tile.template operator()<4>(r);
  if (r + 2 <= queries) {
    tile.template operator()<2>(r);
    r += 2;
  }
  if (r < queries) tile.template operator()<1>(r);
}

// ---- Sums of lanes: sum i is that of vector i. The order of the additions is that of a single vector.

constexpr int kSums = W == 16 ? 16 : 8;  // accumulators of a tile, which stay in registers

#if QUEST_WIDTH == 16

QUEST_INLINE __m512 add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
QUEST_INLINE __m512i add(__m512i a, __m512i b) { return _mm512_add_epi32(a, b); }

template <class V>
QUEST_INLINE V sum_lanes(V* v) {
  // Even and odd lanes, in each quarter; and even and odd quarters.
  const auto even = [](V a, V b) { return (V)_mm512_maskz_shuffle_ps(0xffff, (__m512)a, (__m512)b, 0x88); };
  const auto odd = [](V a, V b) { return (V)_mm512_maskz_shuffle_ps(0xffff, (__m512)a, (__m512)b, 0xdd); };
  const auto even_quarters = [](V a, V b) { return (V)_mm512_maskz_shuffle_f32x4(0xffff, (__m512)a, (__m512)b, 0x88); };
  const auto odd_quarters = [](V a, V b) { return (V)_mm512_maskz_shuffle_f32x4(0xffff, (__m512)a, (__m512)b, 0xdd); };
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) v[i] = add(even(v[2 * i], v[2 * i + 1]), odd(v[2 * i], v[2 * i + 1]));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) v[i] = add(even(v[2 * i], v[2 * i + 1]), odd(v[2 * i], v[2 * i + 1]));
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) v[i] = add(even_quarters(v[2 * i], v[2 * i + 1]), odd_quarters(v[2 * i], v[2 * i + 1]));
  return add(even_quarters(v[0], v[1]), odd_quarters(v[0], v[1]));
}

QUEST_INLINE void sum_lanes(Vec* v, float* sums) { store(sums, (Vec)sum_lanes<__m512>((__m512*)v)); }

#else

QUEST_INLINE Vec4 sum_lanes(Vec a, Vec b, Vec c, Vec d) {
#define QUEST_PAIRS(x, y, ...) (__builtin_shufflevector(x, y, __VA_ARGS__))
#if QUEST_WIDTH == 4
#define QUEST_EVEN 0, 4, 2, 6
#define QUEST_ODD 1, 5, 3, 7
#define QUEST_LOW 0, 1, 4, 5
#define QUEST_HIGH 2, 3, 6, 7
#else
#define QUEST_EVEN 0, 8, 2, 10, 4, 12, 6, 14
#define QUEST_ODD 1, 9, 3, 11, 5, 13, 7, 15
#define QUEST_LOW 0, 1, 8, 9, 4, 5, 12, 13
#define QUEST_HIGH 2, 3, 10, 11, 6, 7, 14, 15
#endif
  const Vec ab = QUEST_PAIRS(a, b, QUEST_EVEN) + QUEST_PAIRS(a, b, QUEST_ODD);
  const Vec cd = QUEST_PAIRS(c, d, QUEST_EVEN) + QUEST_PAIRS(c, d, QUEST_ODD);
  const Vec abcd = QUEST_PAIRS(ab, cd, QUEST_LOW) + QUEST_PAIRS(ab, cd, QUEST_HIGH);
  Vec4 quarters[W / 4];
  __builtin_memcpy(quarters, &abcd, sizeof abcd);
  Vec4 sum = quarters[0];
  for (int i = 1; i < W / 4; ++i) sum += quarters[i];
  return sum;
#undef QUEST_PAIRS
#undef QUEST_EVEN
#undef QUEST_ODD
#undef QUEST_LOW
#undef QUEST_HIGH
}

QUEST_INLINE void sum_lanes(const Vec* v, float* sums) {
  store_as(sums, sum_lanes(v[0], v[1], v[2], v[3]));
  store_as(sums + 4, sum_lanes(v[4], v[5], v[6], v[7]));
}

#endif

}  // namespace
}  // namespace quest::cpu::QUEST_ISA
