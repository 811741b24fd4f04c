// Selects the pages that an attend split reads, from the keys that score splits left.
//
// In long rows not every key is looked at. Scoring also leaves the largest key of each superpage of kSuperpage pages.
// The K best pages lie in the K superpages whose largest keys are best: K pages precede any page of another superpage.
// So superpages are selected first, and then the pages within them.
#pragma once

#include "../tile/attend.cuh"
#include "../tile/radix_select.cuh"
#include "params.cuh"

namespace quest::cuda {

constexpr int kSuperpage = kMmaRows, kLongRow = 8192;  // pages
__host__ __device__ __forceinline__ int superpages_of(int pages) { return (pages + kSuperpage - 1) / kSuperpage; }

// n keys, and those of kNoKey that complete the last vector of them.
__device__ __forceinline__ int whole_vecs(int n) { return (n + kVecKeys - 1) / kVecKeys * kVecKeys; }

// The room for n keys in device memory. A row has the keys of its pages first, then those of its superpages.
__host__ __device__ __forceinline__ int64_t key_room(int n) {
  return int64_t{vecs_per_thread<kStepThreads>(n)} * kVecKeys * kStepThreads;
}

struct ListedPage {
  int physical;  // or kInvalidPage
  int tokens;    // in the page
};

// What selection uses of a block's dynamic shared memory, from its beginning.
template <int kSlotBytes>
struct SelectMemory {
  alignas(16) std::byte slots[kSlotBytes];  // the keys, and then the page table; attention and scoring use them too
  SelectShared<kStepThreads> select;
  ListedPage pages[kMaxListedPages];

  static __device__ __forceinline__ SelectMemory& get() {
    extern __shared__ __align__(16) std::byte dynamic[];
    return *reinterpret_cast<SelectMemory*>(dynamic);
  }
};

// Entries [first, end) of the K of a row.
template <int kSlotBytes>
struct PageSelector {
  using Memory = SelectMemory<kSlotBytes>;
  // The slots hold rows of one vector a thread: keys in all but the last row, the selected superpages in the last.
  static constexpr int kRowBytes = kStepThreads * static_cast<int>(sizeof(uint4));
  static constexpr int kMaxSuperpages = kRowBytes / static_cast<int>(sizeof(int));
  static constexpr int kSharedVecs =
      kSlotBytes / kRowBytes - 1;  // vectors of keys of a thread that shared memory holds

  const uint32_t* keys;  // of the pages, and from key_room(P) on of the superpages
  int32_t* pages;        // of the row, to be written
  const int32_t* table;  // of the sequence
  int n, K, sink_pages, recent_pages, first, end;
  int P, N, page_shift, length;

  static __device__ __forceinline__ std::byte* slots() { return Memory::get().slots; }
  static __device__ __forceinline__ int* superpages() {
    return reinterpret_cast<int*>(slots() + kSharedVecs * kRowBytes);
  }

  static __device__ __forceinline__ bool by_superpages(int n, int K) {
    return n > kLongRow && K <= kMaxSuperpages && n >= 2 * kSuperpage * K;
  }

  // The place of the i-th key of n, such that selecting threads read one vector each, side by side.
  static __device__ __forceinline__ int key_place(int i, int n) {
    const int vec = i / kVecKeys, vecs = vecs_per_thread<kStepThreads>(n), thread = vec / vecs;
    return ((vec - thread * vecs) * kStepThreads + thread) * kVecKeys + i % kVecKeys;
  }

  __device__ __forceinline__ void put(int place, int page) const {
    const int number = page < P ? table[page] : -1;
    const int tokens = min(1 << page_shift, length - (page << page_shift));
    Memory::get().pages[place - first] = {number < 0 || number >= N ? kInvalidPage : number, tokens};
    if (pages) pages[place] = page;
  }
  // The page of an earlier step. The list may have any numbers. The newest pages have places of their own, and their
  // new token may not be there yet.
  __device__ __forceinline__ void put_kept(int place) const {
    const int page = pages[place];
    if (page >= 0 && page < n - recent_pages)
      put(place, page);
    else
      Memory::get().pages[place - first] = {kInvalidPage, 0};
  }

  // A vector of keys that shared memory does not hold.
  static __device__ __noinline__ uint4 load_keys(const uint4* keys, bool exists) {
    static_assert(kNoKey == 0);
    return exists ? __ldcg(keys) : uint4{};
  }

  // Copies the table to shared memory, behind the keys, while the scores are awaited. It needs room and alignment.
  // select() waits for the copy with its own.
  __device__ __forceinline__ void fetch_table() {
    constexpr int kEntries = sizeof(uint4) / sizeof(int32_t);
    const int pieces = (n + kEntries - 1) / kEntries, vecs = vecs_per_thread<kStepThreads>(n);
    if (2 * vecs > kSharedVecs || pieces * kEntries > P || reinterpret_cast<uintptr_t>(table) % 16) return;
    uint4* const copy = reinterpret_cast<uint4*>(slots()) + vecs * kStepThreads;
#pragma unroll 1
    for (int i = threadIdx.x; i < pieces; i += kStepThreads)
      copy_async_16(copy + i, reinterpret_cast<const uint4*>(table) + i);
    table = reinterpret_cast<const int32_t*>(copy);
  }

  // Superpages that have forced pages.
  __device__ __forceinline__ int forced_superpages() const {
    return superpages_of(sink_pages) + (recent_pages ? superpages_of(n) - (n - recent_pages) / kSuperpage : 0);
  }

  // By all threads, once the keys are there. It is a function of its own, so that its registers are not taken from the
  // rest of the kernel. One copy serves superpages and pages.
  static __device__ __noinline__ void select(PageSelector row) {
    const bool by_superpages = PageSelector::by_superpages(row.n, row.K);
    int count = row.n, forced = row.sink_pages + row.recent_pages;
    const uint32_t* keys = row.keys;
    if (by_superpages) count = superpages_of(row.n), forced = row.forced_superpages(), keys += key_room(row.P);
#pragma unroll 1
    for (bool pick_superpages = by_superpages;; pick_superpages = false) {
      const bool within = by_superpages && !pick_superpages;
      const int vecs = vecs_per_thread<kStepThreads>(count), shared_vecs = min(vecs, kSharedVecs);
      const auto address = [&](int j) {
        int at = j * kStepThreads + threadIdx.x;
        if (within) {
          constexpr int kSuperpageVecs = kSuperpage / kVecKeys;
          const int vec = min(vecs * static_cast<int>(threadIdx.x) + j, row.K * kSuperpageVecs - 1);
          at = superpages()[vec / kSuperpageVecs] * kSuperpageVecs + vec % kSuperpageVecs;
        }
        return reinterpret_cast<const uint4*>(keys) + at;
      };
      uint4* const own = reinterpret_cast<uint4*>(slots()) + threadIdx.x;
      // Scoring wrote whole vectors. Vectors past the last are zeros, which are kNoKey.
      const int own_vecs = whole_vecs(count) / kVecKeys - vecs * static_cast<int>(threadIdx.x);
#pragma unroll 1
      for (int j = 0; j < shared_vecs; ++j) {
        const uint64_t from = reinterpret_cast<uint64_t>(address(j));
        copy_async_16_or_zeros(shared_address(own + j * kStepThreads), from, j < own_vecs);
      }
      commit_copies();
      wait_copies<0>();
      const auto load = [&](int j) {
        return j < kSharedVecs ? own[j * kStepThreads] : load_keys(address(j), j < own_vecs);
      };
      KeyRange range;
#pragma unroll 2
      for (int j = 0; j < vecs; ++j) range.add(load(j));
      select_best<kStepThreads>(count, row.K, forced, range, Memory::get().select, load, [&](int place, int i) {
        if (pick_superpages) {
          superpages()[place] = i;
        } else if (place >= row.first && place < row.end) {
          row.put(place, within ? superpages()[i / kSuperpage] * kSuperpage + i % kSuperpage : i);
        }
      });
      if (!pick_superpages) return;
      count = row.K * kSuperpage, forced = row.sink_pages + row.recent_pages, keys = row.keys;
      __syncthreads();
    }
  }
};

}  // namespace quest::cuda
