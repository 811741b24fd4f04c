// Rows of signed bytes (8-bit page bounds) against query heads of two bytes: as row_mma.cuh, a lane takes 16 bytes of
// its row at a time, so runs of 16 elements, and makes pairs of T of them in registers. Every signed byte is a T
// exactly.
#pragma once

#include "row_mma.cuh"

namespace quest::cuda {

// One lane's share of a row of D bytes: runs c, c + 4, ... of 16.
template <int D>
struct ByteRow {
  static constexpr int kCount = (D + 63) / 64;
  uint4 at[kCount];

  __device__ __forceinline__ void load(const int8_t* row) {
    const int c = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int d = (4 * i + c) * 16;
      at[i] = load_once(row + d, row && (D % 64 == 0 || d < D));
    }
  }
};

// Four signed bytes as two pairs of T: their bits, made unsigned, become the last bits of a float with a known offset.
template <class T>
__device__ __forceinline__ uint2 unpack_bytes(uint32_t bytes) {
  const uint32_t x = bytes ^ 0x80808080u;
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 offset = __float2half2_rn(1024.f + 128.f);
    const uint32_t low = __byte_perm(x, 0x64646464u, 0x5140), high = __byte_perm(x, 0x64646464u, 0x5342);
    const __half2 a = __hsub2(reinterpret_cast<const __half2&>(low), offset);
    const __half2 b = __hsub2(reinterpret_cast<const __half2&>(high), offset);
    return {reinterpret_cast<const uint32_t&>(a), reinterpret_cast<const uint32_t&>(b)};
  } else {
    constexpr float kOffset = 8388608.f + 128.f;
    const auto whole = [&](uint32_t selector) {
      return __float_as_uint(__uint_as_float(__byte_perm(x, 0x4b000000u, selector)) - kOffset);
    };
    // Eight significant bits: the upper half of the float is all of it.
    return {__byte_perm(whole(0x7540), whole(0x7541), 0x7632), __byte_perm(whole(0x7542), whole(0x7543), 0x7632)};
  }
}

template <class T, int D>
__device__ __forceinline__ void dot(
    float (&acc)[4], const ByteRow<D>& low, const ByteRow<D>& high, const RowPieces<D, 16>& heads) {
#pragma unroll
  for (int i = 0; i < ByteRow<D>::kCount; ++i) {
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
