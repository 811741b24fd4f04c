// Rows of the cache on their way to shared memory while a warp works: sixteen rows of a warp are copied in pieces of 16
// bytes, and read back as the tensor cores want them.
//
// Pieces are swizzled, so that lanes which read at the same time meet in no bank. Rows of a multiple of 128 bytes need
// it. Keys and bounds are read by row r and piece 4 i + c, values by tokens 2 c + ... and piece 8 i + r (mma_rows.cuh).
#pragma once

#include "mma_rows.cuh"

namespace quest::cuda {

enum class ReadBy { row, token };

template <int kRowBytes, ReadBy kReadBy>
struct RowSlot {
  static constexpr int kPieces = kRowBytes / 16;
  static_assert(kRowBytes % 16 == 0);

  static __device__ __forceinline__ int offset(int row, int piece) {
    if (kPieces % 8 == 0) piece ^= kReadBy == ReadBy::row ? row % 2 * 4 : row / 2 % 4 * 2;
    return (row * kPieces + piece) * 16;
  }

  // row: the address of row `lane` modulo kRows; null reads as zeros. By all lanes. base: any address of the tensor,
  // which a null row reads nothing from.
  template <int kRows = kMmaRows>
  static __device__ __forceinline__ void copy(std::byte* slot, const void* row, const void* base) {
    static_assert(kRows * kPieces % kWarpSize == 0);
    const int lane = threadIdx.x % kWarpSize;
    const unsigned to = shared_address(slot);
    const unsigned exists = __ballot_sync(kFullMask, row != nullptr);
    const uint64_t from = reinterpret_cast<uint64_t>(row ? row : base);
#pragma unroll
    for (int i = 0; i < kRows * kPieces / kWarpSize; ++i) {
      const int at = i * kWarpSize + lane, owner = at / kPieces, piece = at % kPieces;
      const uint64_t source = __shfl_sync(kFullMask, from, owner) + piece * 16;
      copy_async_16_or_zeros(to + offset(owner, piece), source, exists >> owner & 1);
    }
  }

  static __device__ __forceinline__ uint4 read(const std::byte* slot, int row, int piece) {
    if (piece >= kPieces) return {};
    return *reinterpret_cast<const uint4*>(slot + offset(row, piece));
  }
  // A piece of 8 bytes, numbered so.
  static __device__ __forceinline__ uint2 read_8(const std::byte* slot, int row, int piece) {
    if (piece >= 2 * kPieces) return {};
    return *reinterpret_cast<const uint2*>(slot + offset(row, piece / 2) + piece % 2 * 8);
  }
};

}  // namespace quest::cuda
