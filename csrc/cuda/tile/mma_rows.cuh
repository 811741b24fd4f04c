// Sixteen rows of the cache (keys, or the bounds of pages) against eight query heads on the tensor cores.
//
// The products are m16n8k16 with the cache as A and the queries as B, so that a group of up to eight heads wastes
// nothing. The instruction wants pairs of elements from all over the contracted dimension. A dot product does not
// depend on the order of its terms, so each lane takes 16 contiguous bytes of its row, and the queries follow the same
// order. That needs no shuffles, and reads full 64-byte sectors.
//
// Lane l has r = l / 4 (rows r and r + 8, and query head r) and c = l % 4 (heads 2c and 2c + 1 of the result).
#pragma once

#include <cute/arch/copy_sm75.hpp>
#include <cute/arch/mma_sm80.hpp>

#include "../core/elements.cuh"
#include "../core/ptx.cuh"

namespace quest::cuda {

constexpr int kMmaRows = 16;
constexpr int kMmaHeads = 8;

template <class T>
struct MmaAtom;
template <>
struct MmaAtom<__half> {
  using type = cute::SM80_16x8x16_F32F16F16F32_TN;
};
template <>
struct MmaAtom<__nv_bfloat16> {
  using type = cute::SM80_16x8x16_F32BF16BF16F32_TN;
};

template <class T>
__device__ __forceinline__ void mma(
    float (&acc)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  MmaAtom<T>::type::fma(acc[0], acc[1], acc[2], acc[3], a0, a1, a2, a3, b0, b1, acc[0], acc[1], acc[2], acc[3]);
}

template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 h = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(h);
  } else {
    const __nv_bfloat162 h = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(h);
  }
}

// One lane's share of a row of D elements: pieces c, c + 4, c + 8, ... of kPiece elements, in vectors of eight.
template <int D, int kPiece = 8>
struct RowPieces {
  static constexpr int kVecs = kPiece / 8;
  static constexpr int kCount = (D + 4 * kPiece - 1) / (4 * kPiece) * kVecs;
  uint4 at[kCount];

  // A null row reads as zeros, and so do elements past D.
  template <class T>
  __device__ __forceinline__ void load(const T* row) {
    const int c = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int d = (4 * (i / kVecs) + c) * kPiece + i % kVecs * 8;
      at[i] = load_once(row + d, row && (D % (4 * kPiece) == 0 || d < D));
    }
  }

  __device__ __forceinline__ uint4 operator[](int i) const { return at[i]; }
};

template <class T, class Pieces, class F>
__device__ __forceinline__ Pieces map_pairs(Pieces q, F f) {
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
#pragma unroll
  for (int i = 0; i < Pieces::kCount; ++i) {
    Pair* pairs = reinterpret_cast<Pair*>(&q.at[i]);
#pragma unroll
    for (int j = 0; j < 4; ++j) pairs[j] = f(pairs[j]);
  }
  return q;
}

// max(q, 0) and min(q, 0), two elements at a time. NaN stays NaN in both.
template <class T, class Pieces>
__device__ __forceinline__ Pieces positive_part(const Pieces& q) {
  return map_pairs<T>(q, [](auto x) { return __hmax2_nan(x, decltype(x){}); });
}
template <class T, class Pieces>
__device__ __forceinline__ Pieces negative_part(const Pieces& q) {
  return map_pairs<T>(q, [](auto x) { return __hmin2_nan(x, decltype(x){}); });
}

// acc += rows . heads: acc[0], acc[1] of row r (`low`), acc[2], acc[3] of row r + 8 (`high`), for heads 2c and 2c + 1.
template <class T, int D>
__device__ __forceinline__ void dot(
    float (&acc)[4], const RowPieces<D>& low, const RowPieces<D>& high, const RowPieces<D>& heads) {
#pragma unroll
  for (int i = 0; i < RowPieces<D>::kCount; ++i) {
    const uint4 lo = low[i], hi = high[i], q = heads[i];
    mma<T>(acc, lo.x, hi.x, lo.y, hi.y, q.x, q.y);
    mma<T>(acc, lo.z, hi.z, lo.w, hi.w, q.z, q.w);
  }
}

// The values: out^T [D x heads] += V^T p^T over sixteen tokens. Lane l takes pieces r, r + 8, ... of the values of
// tokens 2c, 2c + 1, 2c + 8 and 2c + 9, and pairs the tokens' elements by byte permutes.
template <int D>
struct ValuePieces {
  static constexpr int kCount = (D + 63) / 64;
  uint4 at[4][kCount];

  template <class T>
  __device__ __forceinline__ void load(int token, const T* row) {
    const int r = threadIdx.x % kWarpSize / 4;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int d = (8 * i + r) * 8;
      at[token][i] = load_once(row + d, row && (D % 64 == 0 || d < D));
    }
  }
};

// One lane's part of out^T: acc[i][w] holds d = 64 i + 8 r + 2 w (elements 0, 1: heads 2c, 2c + 1) and d + 1 (2, 3).
template <int D>
struct OutTile {
  static constexpr int kCount = ValuePieces<D>::kCount;
  float acc[kCount][4][4] = {};

  // p: the weights of tokens r and r + 8 for heads 2c and 2c + 1, laid out as dot() leaves its result.
  template <class T>
  __device__ __forceinline__ void add(const ValuePieces<D>& values, const float (&p)[4]) {
    uint32_t b0, b1;
    cute::SM75_U32x1_MOVM_T::copy(pack<T>(p[0], p[1]), b0);
    cute::SM75_U32x1_MOVM_T::copy(pack<T>(p[2], p[3]), b1);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint32_t* v0 = &values.at[0][i].x;
      const uint32_t* v1 = &values.at[1][i].x;
      const uint32_t* v2 = &values.at[2][i].x;
      const uint32_t* v3 = &values.at[3][i].x;
#pragma unroll
      for (int w = 0; w < 4; ++w)
        mma<T>(
            acc[i][w], __byte_perm(v0[w], v1[w], 0x5410), __byte_perm(v0[w], v1[w], 0x7632),
            __byte_perm(v2[w], v3[w], 0x5410), __byte_perm(v2[w], v3[w], 0x7632), b0, b1);
    }
  }
};

}  // namespace quest::cuda
