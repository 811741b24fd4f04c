// The pages that a run of decode_step attends to.
#pragma once

#include "attend_chunk.cuh"
#include "select.cuh"
#include "step_params.cuh"

namespace quest::cuda {

struct ListedPage {
  int physical;  // or kBrokenPage
  int tokens;    // that are in it
};

// Entries [first, end) of the K of a row, by a block that has kRoom bytes of dynamic shared memory to spare, and Shared
// behind them.
template <int kRoom>
struct RunList {
  struct Shared {
    SelectShared<kStepThreads> select;
    ListedPage pages[kMostListed];
  };
  // Times four keys that a thread has room for.
  static constexpr int kNearFours = kRoom / static_cast<int>(sizeof(uint4)) / kStepThreads;

  const uint32_t* keys;
  int32_t* pages;        // of the row, to be written
  const int32_t* table;  // of the sequence
  int n, K, forced, first, end;
  int P, N, page_shift, length;

  static __device__ __forceinline__ std::byte* memory() {
    extern __shared__ __align__(16) std::byte dynamic[];
    return dynamic;
  }
  static __device__ __forceinline__ Shared& shared() { return *reinterpret_cast<Shared*>(memory() + kRoom); }

  // Where the key of a page is, of n: threads that select read each four of the keys that they own side by side.
  static __device__ __forceinline__ int key_place(int page, int n) {
    const int four = page / kLaneKeys, fours = own_fours<kStepThreads>(n), thread = four / fours;
    return ((four - thread * fours) * kStepThreads + thread) * kLaneKeys + page % kLaneKeys;
  }

  __device__ __forceinline__ void put(int place, int page) const {
    const int number = page < P ? table[page] : -1;
    const int tokens = min(1 << page_shift, length - (page << page_shift));
    shared().pages[place - first] = {number < 0 || number >= N ? kBrokenPage : number, tokens};
    pages[place] = page;
  }

  // The table to shared memory, past the keys, while scores are waited for: if there is room, and it lies so that it
  // can be copied in pieces of 16 bytes. It is there when select() has waited for its own copies.
  __device__ __forceinline__ void fetch_table() {
    constexpr int kEntries = sizeof(uint4) / sizeof(int32_t);
    const int pieces = (n + kEntries - 1) / kEntries, fours = own_fours<kStepThreads>(n);
    if (2 * fours > kNearFours || pieces * kEntries > P || reinterpret_cast<uintptr_t>(table) % 16) return;
    uint4* const near = reinterpret_cast<uint4*>(memory()) + fours * kStepThreads;
#pragma unroll 1
    for (int i = threadIdx.x; i < pieces; i += kStepThreads)
      copy_piece(near + i, reinterpret_cast<const uint4*>(table) + i);
    table = reinterpret_cast<const int32_t*>(near);
  }

  // Four keys that there is no room for in shared memory, of which `left` are not past the last.
  static __device__ __noinline__ uint4 load_four(const uint4* keys, int left) {
    uint4 four = __ldcg(keys);
    if (left < 1) four.x = kNoKey;
    if (left < 2) four.y = kNoKey;
    if (left < 3) four.z = kNoKey;
    if (left < 4) four.w = kNoKey;
    return four;
  }

  // The best of the row's pages. By all threads, after the keys are there. A function of its own, so that the registers
  // that it wants are not taken from other parts of the kernel.
  static __device__ __noinline__ void select(RunList run) {
    const int fours = own_fours<kStepThreads>(run.n), near = min(fours, kNearFours);
    const uint4* const keys = reinterpret_cast<const uint4*>(run.keys) + threadIdx.x;
    uint4* const own = reinterpret_cast<uint4*>(memory()) + threadIdx.x;
#pragma unroll 1
    for (int j = 0; j < near; ++j) copy_piece(own + j * kStepThreads, keys + j * kStepThreads);
    end_copies();
    wait_copies<0>();
    // Keys past the last are whatever was there.
    const int left = run.n - fours * kLaneKeys * static_cast<int>(threadIdx.x);
#pragma unroll 1
    for (int i = max(0, left); i < near * kLaneKeys; ++i)
      reinterpret_cast<uint32_t*>(own + i / kLaneKeys * kStepThreads)[i % kLaneKeys] = kNoKey;
    const auto four = [&](int j) {
      return j < kNearFours ? own[j * kStepThreads] : load_four(keys + j * kStepThreads, left - j * kLaneKeys);
    };
    SeenKeys seen;
#pragma unroll 2
    for (int j = 0; j < fours; ++j) seen.see(four(j));
    select_best<kStepThreads>(run.n, run.K, run.forced, seen, shared().select, four, [&](int place, int page) {
      if (place >= run.first && place < run.end) run.put(place, page);
    });
  }
};

}  // namespace quest::cuda
