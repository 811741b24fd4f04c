// The loops of page bounds: minima and maxima of keys, and their rounding to 8 bits.
#pragma once

#include "vectors.h"

namespace quest::cpu::QUEST_ISA {
namespace {

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

// ---- 8-bit bounds: multiples of the page's scale, rounded outward so that they stay bounds. Products are exact in
// double, so the CUDA kernels' directed rounding gives the same bits.

constexpr int H = W / 2;  // doubles a vector

typedef double Doubles __attribute__((vector_size(H * 8)));
typedef int64_t Longs __attribute__((vector_size(H * 8)));
typedef float Floats __attribute__((vector_size(H * 4)));
typedef int8_t Bytes __attribute__((vector_size(H)));

// The largest n with n * scale <= x, where it is at most 2^51.
QUEST_INLINE Doubles round_down(Doubles x, double scale) {
  const Doubles quotient = x / scale, magic = Doubles{} + 6755399441055744.0;  // 1.5 * 2^52: sums are integers
  Doubles n = (quotient + magic) - magic;
  n = n > quotient ? n - 1 : n;
  return n * scale > x ? n - 1 : n;
}

QUEST_INLINE void store_bytes(int8_t* p, Doubles x) {
  store_as(p, __builtin_convertvector(__builtin_convertvector(x, Longs), Bytes));
}

void store_int8(const float* lower, const float* upper, int D, int8_t* low, int8_t* high, float* scale) {
  Vec most = {};
  for (int d = 0; d < D; d += W) {
    most = nan_max(most, floats(bits(load(lower + d)) & 0x7fffffff));
    most = nan_max(most, floats(bits(load(upper + d)) & 0x7fffffff));
  }
  const float largest = max_lane(most);
  float step = largest / 127;
  if (double{step} * 127 < largest) {  // the next float
    uint32_t bits;
    __builtin_memcpy(&bits, &step, sizeof bits);
    ++bits;
    __builtin_memcpy(&step, &bits, sizeof bits);
  }
  *scale = step;
  const bool some = step > 0 && step < kInf;  // else zeros: then scores are 0 times the scale
  for (int d = 0; d < D; d += H) {
    const Doubles below = __builtin_convertvector(load_as<Floats>(lower + d), Doubles);
    const Doubles above = __builtin_convertvector(load_as<Floats>(upper + d), Doubles);
    store_bytes(low + d, some ? round_down(below, step) : Doubles{});
    store_bytes(high + d, some ? -round_down(-above, step) : Doubles{});
  }
}

}  // namespace
}  // namespace quest::cpu::QUEST_ISA
