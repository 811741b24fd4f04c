// Rows of the cache on their way to shared memory while a warp does something else (cp.async): sixteen rows of a warp
// are copied in pieces of 16 bytes, and read back as the tensor cores want them.
//
// A piece lies where the lanes that read at the same time meet in no bank: rows that are multiples of 128 bytes have
// their pieces turned round by an amount that depends on the row. Keys and bounds are read by row r and piece 4 i + c,
// values by tokens 2 c + ... and piece 8 i + r (row_mma.cuh).
#pragma once

#include <cstddef>

#include "row_mma.cuh"

namespace quest::cuda {

// 16 bytes to shared memory.
__device__ __forceinline__ void copy_piece(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(to))),
               "l"(from)
               : "memory");
}

enum class ReadBy { row, token };

template <int kRowBytes, ReadBy kReadBy>
struct RowSlot {
  static constexpr int kPieces = kRowBytes / 16;
  static_assert(kRowBytes % 16 == 0);

  static __device__ __forceinline__ int place(int row, int piece) {
    if (kPieces % 8 == 0) piece ^= kReadBy == ReadBy::row ? row % 2 * 4 : row / 2 % 4 * 2;
    return (row * kPieces + piece) * 16;
  }

  // row: where this lane's row is, row `lane` modulo kRows, or null for one that is not there and reads as zeros. By
  // all lanes. base: any address of the tensor, for those that are not there.
  template <int kRows = kMmaRows>
  static __device__ __forceinline__ void copy(std::byte* slot, const void* row, const void* base) {
    static_assert(kRows * kPieces % kWarpSize == 0);
    const int lane = threadIdx.x % kWarpSize;
    const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(slot));
    const unsigned there = __ballot_sync(kFullMask, row != nullptr);
    const uint64_t from = reinterpret_cast<uint64_t>(row ? row : base);
#pragma unroll
    for (int i = 0; i < kRows * kPieces / kWarpSize; ++i) {
      const int at = i * kWarpSize + lane, owner = at / kPieces, piece = at % kPieces;
      const uint64_t source = __shfl_sync(kFullMask, from, owner) + piece * 16;
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to + place(owner, piece)), "l"(source),
                   "r"(static_cast<int>(there >> owner & 1) * 16)
                   : "memory");
    }
  }

  static __device__ __forceinline__ uint4 read(const std::byte* slot, int row, int piece) {
    if (piece >= kPieces) return {};
    return *reinterpret_cast<const uint4*>(slot + place(row, piece));
  }
};

// What was copied since the last call is a group, even if it is nothing.
__device__ __forceinline__ void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all groups of this thread but the latest kLatest, and for the other lanes to have done so.
template <int kLatest>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLatest) : "memory");
  __syncwarp();
}

}  // namespace quest::cuda
