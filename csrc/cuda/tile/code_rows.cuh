// Rows of 8-bit or 4-bit numbers (page bounds) against query heads of 16 bits. As in mma_rows.cuh a lane takes
// contiguous pieces of its row, here 16 elements at a time, and converts them to pairs of T in registers. T holds every
// number exactly.
#pragma once

#include "bounds_codes.cuh"
#include "mma_rows.cuh"

namespace quest::cuda {

// One lane's share of a row of D codes: pieces c, c + 4, ... of 16 codes each.
template <int D, class Piece>
struct CodeRow {
  static constexpr int kCount = (D + 63) / 64;
  Piece at[kCount];

  template <class Code>
  __device__ __forceinline__ void load(const Code* row) {
    const int c = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int piece = 4 * i + c;
      const bool exists = row && (D % 64 == 0 || piece * 16 < D);
      if constexpr (sizeof(Piece) == 16)
        at[i] = load_once(row + piece * 16, exists);
      else
        at[i] = load_once_8(row + piece * 8, exists);
    }
  }
};
template <int D>
using Int8Row = CodeRow<D, uint4>;
template <int D>
using NibbleRow = CodeRow<D, uint2>;

// Four int8 as two pairs of T, exactly. The bits of a byte become the low mantissa bits of a T with a known offset,
// which is then subtracted. fp16 holds all eight bits. bf16 holds seven: it subtracts 128, or 256 where the sign bit is
// set.
template <class T>
__device__ __forceinline__ uint2 unpack_bytes(uint32_t bytes) {
  const auto pairs = [](uint32_t x, uint32_t high_bytes, auto add) {
    const uint32_t low = __byte_perm(x, high_bytes, 0x5140), high = __byte_perm(x, high_bytes, 0x5342);
    return uint2{add(low, 0), add(high, 1)};
  };
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 offset = __float2half2_rn(1024.f + 128.f);
    return pairs(bytes ^ 0x80808080u, 0x64646464u, [&](uint32_t x, int) {
      const __half2 y = __hsub2(reinterpret_cast<const __half2&>(x), offset);
      return reinterpret_cast<const uint32_t&>(y);
    });
  } else {
    const uint32_t signs = bytes & 0x80808080u;
    const uint32_t offsets[2] = {__byte_perm(signs, 0xc3c3c3c3u, 0x5140), __byte_perm(signs, 0xc3c3c3c3u, 0x5342)};
    return pairs(bytes & 0x7f7f7f7fu, 0x43434343u, [&](uint32_t x, int i) {
      const __nv_bfloat162 y =
          __hadd2(reinterpret_cast<const __nv_bfloat162&>(x), reinterpret_cast<const __nv_bfloat162&>(offsets[i]));
      return reinterpret_cast<const uint32_t&>(y);
    });
  }
}

// Elements 0 and 4, 1 and 5, 2 and 6, 3 and 7 of eight 4-bit numbers as pairs of T, exactly. The four bits become the
// low mantissa bits of a T with a known offset, which is then subtracted.
template <class T>
__device__ __forceinline__ uint4 unpack_nibbles(uint32_t bits) {
  const auto pair = [&](int shift) {
    if constexpr (std::is_same_v<T, __half>) {
      const uint32_t x = (bits >> shift & 0x000f000fu) | 0x64006400u;
      const __half2 y = __hsub2(reinterpret_cast<const __half2&>(x), __float2half2_rn(1024.f + 8.f));
      return reinterpret_cast<const uint32_t&>(y);
    } else {
      const uint32_t x = (bits >> shift & 0x000f000fu) | 0x43004300u;
      const __nv_bfloat162 y = __hsub2(reinterpret_cast<const __nv_bfloat162&>(x), __float2bfloat162_rn(128.f + 8.f));
      return reinterpret_cast<const uint32_t&>(y);
    }
  };
  return {pair(0), pair(4), pair(8), pair(12)};
}

// Eight query elements in the order of unpack_nibbles.
__device__ __forceinline__ uint4 order_as_nibbles(const uint4& q) {
  return {
      __byte_perm(q.x, q.z, 0x5410), __byte_perm(q.x, q.z, 0x7632), __byte_perm(q.y, q.w, 0x5410),
      __byte_perm(q.y, q.w, 0x7632)};
}

// heads: in the order of unpack_nibbles.
template <class T, int D>
__device__ __forceinline__ void dot(
    float (&acc)[4], const NibbleRow<D>& low, const NibbleRow<D>& high, const RowPieces<D, 16>& heads) {
#pragma unroll
  for (int i = 0; i < NibbleRow<D>::kCount; ++i) {
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      const uint4 a = unpack_nibbles<T>(w ? low.at[i].y : low.at[i].x),
                  b = unpack_nibbles<T>(w ? high.at[i].y : high.at[i].x), q = heads[2 * i + w];
      mma<T>(acc, a.x, b.x, a.y, b.y, q.x, q.y);
      mma<T>(acc, a.z, b.z, a.w, b.w, q.z, q.w);
    }
  }
}

template <class T, int D>
__device__ __forceinline__ void dot(
    float (&acc)[4], const Int8Row<D>& low, const Int8Row<D>& high, const RowPieces<D, 16>& heads) {
#pragma unroll
  for (int i = 0; i < Int8Row<D>::kCount; ++i) {
    const uint32_t *const lo = &low.at[i].x, *const hi = &high.at[i].x;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const uint2 a = unpack_bytes<T>(lo[w]), b = unpack_bytes<T>(hi[w]);
      const uint4 q = heads[2 * i + w / 2];
      mma<T>(acc, a.x, b.x, a.y, b.y, w % 2 ? q.z : q.x, w % 2 ? q.w : q.y);
    }
  }
}

}  // namespace quest::cuda
