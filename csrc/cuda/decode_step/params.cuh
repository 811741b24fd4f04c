// The kernel's arguments, its constants, and the counters by which its blocks share work.
#pragma once

#include "../core/ptx.cuh"
#include "../tile/combine.cuh"
#include "../tile/mma_rows.cuh"

namespace quest::cuda {

constexpr int kStepThreads = 256;
constexpr int kStepWarps = kStepThreads / kWarpSize;
constexpr int kMaxSequences = kStepThreads;
constexpr int kMaxListedPages = 512;  // of one attend split

// The head tiles of a group, of kMmaHeads query heads each. There is a kernel for each number of them.
constexpr int kMaxHeadTiles = 2;

// Counters outlive a step: the last block to use one leaves it as the next step needs it. Blocks may still wait for
// scores when a row is done, so `scored` cannot return to 0. It counts from 0 in even steps, and from kOddStep in odd
// ones. The highest bit of TakenSplits::score tells which step it is.
constexpr uint32_t kOddStep = 1u << 31;

// Splits that blocks have taken. A block takes its first of both kinds by one 64-bit atomic addition.
struct alignas(8) TakenSplits {
  uint32_t score, attend;

  static __device__ __forceinline__ TakenSplits take_both(TakenSplits* taken) {
    static_assert(sizeof(TakenSplits) == sizeof(unsigned long long));
    static_assert(offsetof(TakenSplits, score) == 0, "score is the low half on a little-endian GPU");
    const uint64_t both = atomicAdd(reinterpret_cast<unsigned long long*>(taken), (1ull << 32) + 1);
    return {.score = static_cast<uint32_t>(both), .attend = static_cast<uint32_t>(both >> 32)};
  }
};

// Splits that are done: of a row, or of a row's head tile. Rows whose heads are scored together count in the first.
struct RowCounters {
  int scored, attended;
};

struct DecodeStepKernelParams {
  DecodeStepParams op;
  int32_t score_heads_log2 = 0;  // KV heads that one split scores: a power of two that divides Hkv, 8 at most
  int32_t attend_splits = 1;     // of all rows, about: no more than blocks
  int32_t large_tiles = 0;       // of all lists, from which on a partial is a supertile
  TakenSplits* taken = nullptr;
  RowCounters* rows = nullptr;  // [B * Hkv * head tiles]
  int32_t max_rows = 0;         // B * Hkv, or more that other steps use
  // Written before they are read:
  uint32_t* keys = nullptr;  // [B * Hkv, keys_stride]
  int64_t keys_stride = 0;
  Partials partials = {};
};

}  // namespace quest::cuda
