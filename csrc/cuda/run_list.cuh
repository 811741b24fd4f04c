// The pages that a run of decode_step attends to.
#pragma once

#include "attend_chunk.cuh"
#include "select.cuh"
#include "step_params.cuh"

namespace quest::cuda {

// Pages that have one key together, in rows of more than so many.
constexpr int kGroupPages = kMmaRows, kLongRow = 8192;
__host__ __device__ __forceinline__ int groups_of(int pages) { return (pages + kGroupPages - 1) / kGroupPages; }

// Room for n keys as they are selected from. A row has its pages' first, and then its groups'.
__host__ __device__ __forceinline__ int64_t key_room(int n) {
  return int64_t{own_fours<kStepThreads>(n)} * kLaneKeys * kStepThreads;
}

struct ListedPage {
  int physical;  // or kBrokenPage
  int tokens;    // that are in it
};

// Entries [first, end) of the K of a row, by a block that has kRoom bytes of dynamic shared memory to spare, and Shared
// behind them.
//
// Of long rows not every key is looked at. Scoring leaves the largest key of each sixteen pages, too, and the K best of
// the row are within the K groups whose largest keys are best: any page of another group has at least K before it. So
// the groups are selected first, and then the pages within them.
template <int kRoom>
struct RunList {
  struct Shared {
    SelectShared<kStepThreads> select;
    ListedPage pages[kMostListed];
  };
  static constexpr int kRowBytes = kStepThreads * static_cast<int>(sizeof(uint4));
  static constexpr int kMostGroups = kRowBytes / static_cast<int>(sizeof(int));  // whose list has the last such row
  // Times four keys that a thread has room for.
  static constexpr int kNearFours = kRoom / kRowBytes - 1;

  const uint32_t* keys;  // of the pages, and from key_room(P) on of the groups
  int32_t* pages;        // of the row, to be written
  const int32_t* table;  // of the sequence
  int n, K, sink_pages, recent_pages, first, end;
  int P, N, page_shift, length;

  static __device__ __forceinline__ std::byte* memory() {
    extern __shared__ __align__(16) std::byte dynamic[];
    return dynamic;
  }
  static __device__ __forceinline__ Shared& shared() { return *reinterpret_cast<Shared*>(memory() + kRoom); }
  static __device__ __forceinline__ int* groups() { return reinterpret_cast<int*>(memory() + kNearFours * kRowBytes); }

  static __device__ __forceinline__ bool in_groups(int n, int K) {
    return n > kLongRow && K <= kMostGroups && n >= 2 * kGroupPages * K;
  }

  // Where the i-th key of n is: threads that select read each four of the keys that they own side by side.
  static __device__ __forceinline__ int key_place(int i, int n) {
    const int four = i / kLaneKeys, fours = own_fours<kStepThreads>(n), thread = four / fours;
    return ((four - thread * fours) * kStepThreads + thread) * kLaneKeys + i % kLaneKeys;
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

  // Groups that have forced pages.
  __device__ __forceinline__ int forced_groups() const {
    return groups_of(sink_pages) + (recent_pages ? groups_of(n) - (n - recent_pages) / kGroupPages : 0);
  }

  // The best of the row's pages. By all threads, after the keys are there. A function of its own, so that the registers
  // that it wants are not taken from other parts of the kernel; one copy of it for groups and pages.
  static __device__ __noinline__ void select(RunList run) {
    const bool in_groups = RunList::in_groups(run.n, run.K);
    int count = run.n, forced = run.sink_pages + run.recent_pages;
    const uint32_t* keys = run.keys;
    if (in_groups) count = groups_of(run.n), forced = run.forced_groups(), keys += key_room(run.P);
#pragma unroll 1
    for (bool pick_groups = in_groups;; pick_groups = false) {
      const bool within = in_groups && !pick_groups;
      const int fours = own_fours<kStepThreads>(count), near = min(fours, kNearFours);
      const auto address = [&](int j) {
        int at = j * kStepThreads + threadIdx.x;
        if (within) {
          constexpr int kFours = kGroupPages / kLaneKeys;
          const int four = min(fours * static_cast<int>(threadIdx.x) + j, run.K * kFours - 1);
          at = groups()[four / kFours] * kFours + four % kFours;
        }
        return reinterpret_cast<const uint4*>(keys) + at;
      };
      uint4* const own = reinterpret_cast<uint4*>(memory()) + threadIdx.x;
#pragma unroll 1
      for (int j = 0; j < near; ++j) copy_piece(own + j * kStepThreads, address(j));
      end_copies();
      wait_copies<0>();
      // Keys past the last are whatever was there.
      const int left = count - fours * kLaneKeys * static_cast<int>(threadIdx.x);
#pragma unroll 1
      for (int i = max(0, left); i < near * kLaneKeys; ++i)
        reinterpret_cast<uint32_t*>(own + i / kLaneKeys * kStepThreads)[i % kLaneKeys] = kNoKey;
      const auto four = [&](int j) {
        return j < kNearFours ? own[j * kStepThreads] : load_four(address(j), left - j * kLaneKeys);
      };
      SeenKeys seen;
#pragma unroll 2
      for (int j = 0; j < fours; ++j) seen.see(four(j));
      select_best<kStepThreads>(count, run.K, forced, seen, shared().select, four, [&](int place, int i) {
        if (pick_groups) {
          groups()[place] = i;
        } else if (place >= run.first && place < run.end) {
          run.put(place, within ? groups()[i / kGroupPages] * kGroupPages + i % kGroupPages : i);
        }
      });
      if (!pick_groups) return;
      count = run.K * kGroupPages, forced = run.sink_pages + run.recent_pages, keys = run.keys;
      __syncthreads();
    }
  }
};

}  // namespace quest::cuda
