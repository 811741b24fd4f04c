// The loops, written once over the compiler's vector types. One file for each instruction set includes them and sets
// QUEST_ISA, the namespace, and QUEST_WIDTH, floats a vector. Everything is static or in that namespace.
//
// Explicit vectors fix the order of every sum, as `omp simd` reductions would not. It is the same for a query alone and
// beside others, and tiles of accumulators stay in registers.
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

// ---- Elements. Conversions are exact or round to nearest even, in every denormal mode of the processor.

struct F32 {
  using Storage = float;
  QUEST_INLINE Vec load(const float* p) { return load_as<Vec>(p); }
  QUEST_INLINE void store(float* p, Vec v) { store_as(p, v); }
};

struct BF16 {
  using Storage = uint16_t;
  QUEST_INLINE Vec load(const uint16_t* p) { return floats(widen(load_as<Halves>(p)) << 16); }
  QUEST_INLINE void store(uint16_t* p, Vec v) {
    const Bits b = bits(v), rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
    store_as(p, __builtin_convertvector(v != v ? (b >> 16) | 0x40 : rounded, Halves));
  }
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
};

// 8-bit page bounds, which are only loaded.
struct I8 {
  using Storage = int8_t;
  typedef int8_t Bytes __attribute__((vector_size(W)));
  QUEST_INLINE Vec load(const int8_t* p) { return __builtin_convertvector(load_as<Bytes>(p), Vec); }
};

template <class E>
void load_row(const void* src, int n, float* dst) {
  for (int i = 0; i < n; i += W) store(dst + i, E::load(static_cast<const typename E::Storage*>(src) + i));
}

template <class E>
void store_row(const float* src, int n, void* dst) {
  for (int i = 0; i < n; i += W) E::store(static_cast<typename E::Storage*>(dst) + i, load(src + i));
}

// ---- The tokens of a page list are scattered, so hardware does not prefetch them. Work on a block prefetches the next
// one, a few tokens at a time.

template <class E>
QUEST_INLINE void prefetch(const void* const* tokens, int first, int last, int D) {
  for (int i = first; i < last; ++i)
    for (int d = 0; d < D; d += 64 / int{sizeof(typename E::Storage)})
      __builtin_prefetch(static_cast<const typename E::Storage*>(tokens[i]) + d);
}

QUEST_INLINE int min(int a, int b) { return a < b ? a : b; }

// ---- Dot products: tiles of R queries by 8 / R keys.

// The sums of the lanes of a, b, c and d.
QUEST_INLINE Vec4 sum_lanes(Vec a, Vec b, Vec c, Vec d) {
#define QUEST_PAIRS(x, y, ...) (__builtin_shufflevector(x, y, __VA_ARGS__))
#if QUEST_WIDTH == 4
#define QUEST_EVEN 0, 4, 2, 6
#define QUEST_ODD 1, 5, 3, 7
#define QUEST_LOW 0, 1, 4, 5
#define QUEST_HIGH 2, 3, 6, 7
#elif QUEST_WIDTH == 8
#define QUEST_EVEN 0, 8, 2, 10, 4, 12, 6, 14
#define QUEST_ODD 1, 9, 3, 11, 5, 13, 7, 15
#define QUEST_LOW 0, 1, 8, 9, 4, 5, 12, 13
#define QUEST_HIGH 2, 3, 10, 11, 6, 7, 14, 15
#else
#define QUEST_EVEN 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30
#define QUEST_ODD 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31
#define QUEST_LOW 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define QUEST_HIGH 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
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

template <class E, int R>
QUEST_INLINE void dots_tile(
    const float* q, const void* const* keys, int n, int D, float scale, float* out, int64_t out_stride) {
  constexpr int N = 8 / R;
  const typename E::Storage* key[N];
  for (int j = 0; j < N; ++j) key[j] = static_cast<const typename E::Storage*>(keys[j < n ? j : 0]);
  Vec sums[8] = {};
  for (int d = 0; d < D; d += W) {
    Vec x[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) x[r] = keep(load(q + r * D + d));
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      const Vec k = R > 1 ? keep(E::load(key[j] + d)) : E::load(key[j] + d);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sums[r * N + j] += x[r] * k;
    }
  }
  float dots[8];
  store_as(dots, sum_lanes(sums[0], sums[1], sums[2], sums[3]) * scale);
  store_as(dots + 4, sum_lanes(sums[4], sums[5], sums[6], sums[7]) * scale);
  for (int r = 0; r < R; ++r)
    if (n >= N)
      __builtin_memcpy(out + r * out_stride, dots + r * N, N * sizeof(float));
    else
      for (int j = 0; j < n; ++j) out[r * out_stride + j] = dots[r * N + j];
}

template <class E>
void dots(
    const float* q, int queries, const void* const* keys, int n, int D, float scale, float* out, int64_t out_stride) {
  for (int begin = 0; begin < n; begin += kBlock) {
    const int end = min(begin + kBlock, n);
    int r = 0;
    const auto tiles = [&]<int R>() __attribute__((always_inline)) {
      constexpr int N = 8 / R;
      for (int j = begin; j < end; j += N) {
        if (r == 0) prefetch<E>(keys, min(j + kBlock, n), min(j + kBlock + N, n), D);
        dots_tile<E, R>(q + r * D, keys + j, end - j, D, scale, out + r * out_stride + j, out_stride);
      }
      r += R;
    };
    while (r + 4 <= queries) tiles.template operator()<4>();
    if (r + 2 <= queries) tiles.template operator()<2>();
    if (r < queries) tiles.template operator()<1>();
  }
}

// ---- Weighted sums: tiles of R queries by V vectors of the head dimension.

template <class E, int R, int V>
QUEST_INLINE void accumulate_tile(
    const float* weights, int64_t weights_stride, const void* const* values, int n, int d, int D, float* out) {
  Vec sums[R][V] = {};
  for (int j = 0; j < n; ++j) {
    const auto* value = static_cast<const typename E::Storage*>(values[j]) + d;
    Vec v[V];
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i) v[i] = R > 1 ? keep(E::load(value + i * W)) : E::load(value + i * W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec w = splat(weights[r * weights_stride + j]);
#pragma GCC unroll 8
      for (int i = 0; i < V; ++i) sums[r][i] += w * v[i];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i) {
      float* const sum = out + r * D + d + i * W;
      store(sum, load(sum) + sums[r][i]);
    }
}

template <class E>
void accumulate(
    const float* weights, int64_t weights_stride, int queries, const void* const* values, int n, int D, float* out) {
  for (int begin = 0; begin < n; begin += kBlock) {
    const int end = min(begin + kBlock, n);
    int r = 0;
    const auto tiles = [&]<int R>() __attribute__((always_inline)) {
      constexpr int V = 8 / R;
      const float* w = weights + r * weights_stride + begin;
      int d = 0;
      for (; d + V * W <= D; d += V * W) {
        if (r == 0) {  // this tile's share of the next block
          const int next = min(end + d * kBlock / D, n), last = min(end + (d + V * W) * kBlock / D, n);
          prefetch<E>(values, next, last, D);
        }
        accumulate_tile<E, R, V>(w, weights_stride, values + begin, end - begin, d, D, out + r * D);
      }
      for (; d < D; d += W) accumulate_tile<E, R, 1>(w, weights_stride, values + begin, end - begin, d, D, out + r * D);
      r += R;
    };
    while (r + 4 <= queries) tiles.template operator()<4>();
    if (r + 2 <= queries) tiles.template operator()<2>();
    if (r < queries) tiles.template operator()<1>();
  }
}

// ---- Minima and maxima.

template <class E, int V>
QUEST_INLINE void bounds_tile(const typename E::Storage* keys, int64_t stride, int n, float* lower, float* upper) {
  Vec least[V], most[V];
  Bits nan[V] = {};  // comparisons with NaN are false, so minimum and maximum miss it
#pragma GCC unroll 4
  for (int i = 0; i < V; ++i) least[i] = most[i] = E::load(keys + i * W);
  for (int j = 0; j < n; ++j)
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) {
      const Vec k = keep(E::load(keys + j * stride + i * W));
      least[i] = k < least[i] ? k : least[i];
      most[i] = k > most[i] ? k : most[i];
      nan[i] |= (Bits)(k != k);
    }
#pragma GCC unroll 4
  for (int i = 0; i < V; ++i) {
    store(lower + i * W, floats(bits(least[i]) | nan[i]));
    store(upper + i * W, floats(bits(most[i]) | nan[i]));
  }
}

template <class E>
void bounds(const void* keys, int64_t stride, int n, int D, float* lower, float* upper) {
  const auto* key = static_cast<const typename E::Storage*>(keys);
  int d = 0;
  for (; d + 4 * W <= D; d += 4 * W) bounds_tile<E, 4>(key + d, stride, n, lower + d, upper + d);
  for (; d < D; d += W) bounds_tile<E, 1>(key + d, stride, n, lower + d, upper + d);
}

QUEST_INLINE Vec nan_max(Vec a, Vec b) { return ((b > a) | (b != b)) ? b : a; }

constexpr float kInf = __builtin_inff();

// The last n < W elements, with `fill` in the lanes past them.
QUEST_INLINE Vec load_tail(const float* x, int n, float fill) {
  float lanes[W];
  for (int i = 0; i < W; ++i) lanes[i] = i < n ? x[i] : fill;
  return load(lanes);
}

float max(const float* x, int n) {
  Vec most = splat(-kInf);
  int i = 0;
  for (; i + W <= n; i += W) most = nan_max(most, load(x + i));
  if (i < n) most = nan_max(most, load_tail(x + i, n - i, -kInf));
  float result = most[0];
  for (int lane = 1; lane < W; ++lane) result = most[lane] > result || most[lane] != most[lane] ? most[lane] : result;
  return result;
}

// ---- exp(x) for x <= 0 to about 1 ulp, as 2^k * p(r). Here k = round(x / ln 2), r = x - k ln 2, |r| <= ln(2) / 2.

QUEST_INLINE Vec exp_nonpositive(Vec x) {
  const Vec least = splat(-87.33654f);  // below it exp is denormal, and 0 here
  const Vec clamped = x < least ? least : x;
  const Vec shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23, so that the sum's last bits are k
  const Vec k = shifted - 12582912.0f;
  const Vec r = (clamped - k * 0.693359375f) - k * -2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Vec power = floats((bits(shifted) << 23) + 0x3f800000);
  return x < least ? splat(0.0f) : p * power;
}

float exp_sum(float* x, int n, float subtract) {
  Vec sum = {};
  int i = 0;
  for (; i + W <= n; i += W) {
    const Vec e = exp_nonpositive(load(x + i) - subtract);
    store(x + i, e);
    sum += e;
  }
  if (i < n) {
    const Vec e = exp_nonpositive(load_tail(x + i, n - i, -kInf) - subtract);
    for (int lane = 0; lane < n - i; ++lane) x[i + lane] = e[lane], sum[lane] += e[lane];
  }
  float result = 0;
  for (int lane = 0; lane < W; ++lane) result += sum[lane];
  return result;
}

#define QUEST_STR_(x) #x
#define QUEST_STR(x) QUEST_STR_(x)

}  // namespace

extern const Loops kLoops = {
    QUEST_STR(QUEST_ISA),
    {load_row<F32>, load_row<F16>, load_row<BF16>},  // in the order of DType
    {store_row<F32>, store_row<F16>, store_row<BF16>},
    {dots<F32>, dots<F16>, dots<BF16>, dots<I8>},
    {accumulate<F32>, accumulate<F16>, accumulate<BF16>},
    {bounds<F32>, bounds<F16>, bounds<BF16>},
    max,
    exp_sum};

}  // namespace quest::cpu::QUEST_ISA
