// The loops of attention: dot products of queries with keys, and weighted sums of values.
//
// A tile is R queries by some tokens or vectors, R being 4, 2 or 1. A query's sums have the same order in every tile.
#pragma once

#include "vectors.h"

namespace quest::cpu::QUEST_ISA {
namespace {

// ---- The order of the head dimension: that of load_pair, and of `load` for the last W elements where 2W do not fit.

template <class E>
void load_query(const void* src, int D, float* q) {
  const auto* from = static_cast<const typename E::Storage*>(src);
  int d = 0;
  for (; d + 2 * W <= D; d += 2 * W) {
    Vec a, b;
    E::load_pair(from + d, a, b);
    store(q + d, a), store(q + d + W, b);
  }
  if (d < D) store(q + d, E::load(from + d));
}

template <class E>
void store_output(const float* out, int D, void* dst) {
  auto* const to = static_cast<typename E::Storage*>(dst);
  int d = 0;
  for (; d + 2 * W <= D; d += 2 * W) E::store_pair(to + d, load(out + d), load(out + d + W));
  if (d < D) E::store(to + d, load(out + d));
}

// ---- The tokens of a page list are scattered, so hardware does not prefetch them. The first tile of a token
// prefetches the same elements of the token kAhead places later, a line at a time, to the second-level cache.

// The cache lines of `count` elements from d on.
template <class E>
QUEST_INLINE void prefetch(const void* token, int d, int count) {
  constexpr int kLine = 64 / sizeof(typename E::Storage);
#pragma GCC unroll 16
  for (int i = 0; i < count; i += kLine)
    __builtin_prefetch(static_cast<const typename E::Storage*>(token) + d + i, 0, 2);
}

// ---- Dot products: tiles of R queries by kSums / kChains / R keys.

// Sums of a dot product that are added at the end. With those of the lanes there are 8 at least, so that few additions
// round one after the other.
constexpr int kChains = W == 4 ? 2 : 1;

template <int R>
constexpr int kKeys = kSums / kChains / R;

template <class E, int R, bool First>
QUEST_INLINE void dots_tile(
    const float* q, const void* const* keys, int n, int D, float scale, float* out, int64_t out_stride) {
  constexpr int N = kKeys<R>;
  const typename E::Storage* key[N];
  const void* ahead[N];
#pragma GCC unroll 16
  for (int j = 0; j < N; ++j) {
    key[j] = static_cast<const typename E::Storage*>(keys[j < n ? j : 0]);
    ahead[j] = keys[(j < n ? j : 0) + kAhead];
  }
  Vec sums[kSums] = {};
  int d = 0;
  for (; d + 2 * W <= D; d += 2 * W) {
    Vec x[R], y[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) x[r] = keep(load(q + r * D + d)), y[r] = keep(load(q + r * D + d + W));
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) {
      Vec a, b;
      E::load_pair(key[j] + d, a, b);
      if (First) prefetch<E>(ahead[j], d, 2 * W);
      if (R > 1) a = keep(a), b = keep(b);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sums[r * N + j] += x[r] * a;
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sums[(kChains - 1) * R * N + r * N + j] += y[r] * b;
    }
  }
  if (d < D)
#pragma GCC unroll 16
    for (int j = 0; j < N; ++j) {
      const Vec a = E::load(key[j] + d);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sums[r * N + j] += load(q + r * D + d) * a;
    }
  float dots[kSums];
  sum_lanes(sums, dots);
  if (kChains == 2)
    for (int i = 0; i < R * N; ++i) dots[i] += dots[R * N + i];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < min(n, N); ++j) out[r * out_stride + j] = dots[r * N + j] * scale;
}

template <class E>
void dots(
    const float* q, int queries, const void* const* keys, int n, int D, float scale, float* out, int64_t out_stride) {
  for (int begin = 0; begin < n; begin += kBlock) {
    const int end = min(begin + kBlock, n);
    const auto tiles = [&]<int R>(int r) __attribute__((always_inline)) {
      constexpr int N = kKeys<R>;
      for (int j = begin; j < end; j += N) {
        const auto tile = r == 0 ? dots_tile<E, R, true> : dots_tile<E, R, false>;
        tile(q + r * D, keys + j, end - j, D, scale, out + r * out_stride + j, out_stride);
      }
    };
    tile_queries(queries, tiles);
  }
}

// ---- Weighted sums: tiles of R queries by V vectors of the head dimension.

template <class E, int R, int V, bool First>
QUEST_INLINE void accumulate_tile(
    const float* weights, int64_t weights_stride, const void* const* values, int n, int d, int D, float* out) {
  Vec sums[R][V] = {};
  for (int j = 0; j < n; ++j) {
    if (First) prefetch<E>(values[j + kAhead], d, V * W);
    const auto* value = static_cast<const typename E::Storage*>(values[j]) + d;
    Vec v[V];
    if constexpr (V == 1)
      v[0] = E::load(value);
    else
#pragma GCC unroll 8
      for (int i = 0; i < V; i += 2) E::load_pair(value + i * W, v[i], v[i + 1]);
    if (R > 1)
#pragma GCC unroll 16
      for (int i = 0; i < V; ++i) v[i] = keep(v[i]);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec w = splat(weights[r * weights_stride + j]);
#pragma GCC unroll 16
      for (int i = 0; i < V; ++i) sums[r][i] += w * v[i];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
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
    const auto tiles = [&]<int R>(int r) __attribute__((always_inline)) {
      constexpr int kMost = min(kSums / R, 8);
      const float* w = weights + r * weights_stride + begin;
      int d = 0;
      const auto columns = [&]<int V>() __attribute__((always_inline)) {
        if constexpr (V <= kMost)
          for (; d + V * W <= D; d += V * W) {
            const auto tile = r == 0 ? accumulate_tile<E, R, V, true> : accumulate_tile<E, R, V, false>;
            tile(w, weights_stride, values + begin, end - begin, d, D, out + r * D);
          }
      };
      columns.template operator()<8>();
      columns.template operator()<4>();
      columns.template operator()<2>();
      columns.template operator()<1>();
    };
    tile_queries(queries, tiles);
  }
}

}  // namespace
}  // namespace quest::cpu::QUEST_ISA
