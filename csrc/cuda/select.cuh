// The k best of n keys by one block, exactly: what decode_step and topk_pages share.
//
// The range that holds the threshold is cut into as many bins as there are counters, the keys in each are counted, and
// the bin that holds it is the next range, until so few are left that each warp can rank them by itself. The first
// range is small already: where no more keys are wanted than there are threads, each thread's best is a candidate, so
// the threshold is not below the worst of those. No candidate list is kept that could overflow where keys cluster.
//
// A thread owns a contiguous run of keys, so that the places of what gets in follow from one prefix sum. This is one
// block's work for which others wait, and what it costs is the length of its longest chain of instructions: so warps
// find the same thing by themselves where telling them would need a barrier, and nothing branches on a single key.
#pragma once

#include "elements.cuh"

namespace quest::cuda {

// Keys of candidates lie between that of what is no candidate and that of what gets in whatever the others are.
constexpr uint32_t kNoKey = 0, kForcedKey = 0xffffffffu;

// Unsigned keys in the order of the floats: -0 equals +0, NaN is above everything.
__device__ __forceinline__ uint32_t sort_key(float x) {
  if (x != x) return kForcedKey - 1;
  const uint32_t bits = __float_as_uint(x + 0.f);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

constexpr int kSelectBins = 256;
constexpr int kLaneBins = kSelectBins / kWarpSize;
constexpr int kFewKeys = kWarpSize;

template <int kThreads>
struct SelectShared {
  static constexpr int kWarps = kThreads / kWarpSize;
  alignas(16) int bins[kSelectBins];
  uint32_t low[kWarps], worst_best[kWarps], high[kWarps];
  int sums[kWarps];
  uint2 few[kFewKeys];  // key and place
  int num_few, last_tie;
};

// What a thread has seen of the candidates, whichever they are, when the threads have seen them all once.
struct SeenKeys {
  uint32_t best = kNoKey, least_less_one = 0xffffffffu;
  __device__ __forceinline__ void see(uint32_t key) {
    if (key != kForcedKey) best = max(best, key);
    least_less_one = min(least_less_one, key - 1);  // kNoKey - 1 is the largest number
  }
};

constexpr int kLaneKeys = 4;

// So many times four keys a thread owns.
template <int kThreads>
__host__ __device__ __forceinline__ int own_fours(int n) {
  return (n + kLaneKeys * kThreads - 1) / (kLaneKeys * kThreads);
}

// Where four keys are kept in shared memory, in units of four: with a gap after each eight, so that threads which read
// their runs side by side meet in few banks.
__host__ __device__ __forceinline__ int four_place(int i) { return i + i / 8; }

__device__ __forceinline__ int sum_up_to_lane(int x) {
#pragma unroll
  for (int step = 1; step < kWarpSize; step *= 2) {
    const int other = __shfl_up_sync(kFullMask, x, step);
    if (static_cast<int>(threadIdx.x % kWarpSize) >= step) x += other;
  }
  return x;
}

// keys(i): the i-th four of this thread's keys, whose first is number 4 (own_fours * thread + i); kNoKey past n.
template <int kThreads, class Keys, class Take>
struct Selection {
  static constexpr int kWarps = kThreads / kWarpSize;
  static_assert(kWarps <= kWarpSize);
  int n;
  SelectShared<kThreads>& shared;
  Keys keys;
  Take take;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int fours = own_fours<kThreads>(n), first = fours * kLaneKeys * static_cast<int>(threadIdx.x);

  // visit(i, keys): keys i to i + 3.
  template <class Visit>
  __device__ __forceinline__ void each(Visit&& visit) {
#pragma unroll 2
    for (int j = 0; j < fours; ++j) {
      const uint4 four = keys(j);
      const uint32_t x[kLaneKeys] = {four.x, four.y, four.z, four.w};
      visit(first + j * kLaneKeys, x);
    }
  }

  __device__ __forceinline__ void clear_bins() {
#pragma unroll
    for (int i = threadIdx.x; i < kSelectBins; i += kThreads) shared.bins[i] = 0;
  }

  struct Bin {
    int number, above, count;  // above: keys in higher bins
  };
  // The bin, counted from the highest, in which the count of keys reaches `want`. By each warp for itself.
  __device__ __forceinline__ Bin find_bin(int want) const {
    static_assert(kLaneBins == 8);
    const int4* const fours = reinterpret_cast<const int4*>(shared.bins) + 2 * (kWarpSize - 1 - lane);
    const int4 b = fours[0], a = fours[1];
    const int count[kLaneBins] = {a.w, a.z, a.y, a.x, b.w, b.z, b.y, b.x};
    const int sum = ((a.x + a.y) + (a.z + a.w)) + ((b.x + b.y) + (b.z + b.w));
    const int until = sum_up_to_lane(sum);
    int above = until - sum;
    const unsigned here = __ballot_sync(kFullMask, above < want && until >= want);
    Bin bin{};
#pragma unroll
    for (int i = 0; i < kLaneBins; ++i) {
      if (above < want) bin = {kSelectBins - 1 - lane * kLaneBins - i, above, count[i]};
      above += count[i];
    }
    const int owner = __ffs(here) - 1;
    return {
        __shfl_sync(kFullMask, bin.number, owner), __shfl_sync(kFullMask, bin.above, owner),
        __shfl_sync(kFullMask, bin.count, owner)};
  }

  // Those of the keys that are in [low, low + range], to shared.few.
  __device__ __forceinline__ void keep_few(int i, const uint32_t (&x)[kLaneKeys], uint32_t low, uint32_t range) {
    const unsigned count = static_cast<unsigned>(__cvta_generic_to_shared(&shared.num_few));
    const unsigned few = static_cast<unsigned>(__cvta_generic_to_shared(shared.few));
    unsigned at[kLaneKeys];
#pragma unroll
    for (int j = 0; j < kLaneKeys; ++j)
      asm volatile("{.reg .pred p; setp.le.u32 p, %1, %2; @p atom.shared.add.u32 %0, [%3], 1;}"
                   : "=r"(at[j])
                   : "r"(x[j] - low), "r"(range), "r"(count)
                   : "memory");
#pragma unroll
    for (int j = 0; j < kLaneKeys; ++j)
      asm volatile("{.reg .pred p; setp.le.u32 p, %0, %1; @p st.shared.v2.u32 [%2], {%3, %4};}" ::"r"(x[j] - low),
                   "r"(range), "r"(few + at[j] * static_cast<unsigned>(sizeof(uint2))), "r"(x[j]), "r"(i + j)
                   : "memory");
  }

  // The sum of x over the threads before this one, after what the other warps have left in shared.sums.
  __device__ __forceinline__ int sum_before(int until, int x) {
    return __reduce_add_sync(kFullMask, lane < warp ? shared.sums[lane] : 0) + until - x;
  }

  // Calls take(place, i) for all that get in, forced keys among them, `count` < n; places in the order of i.
  __device__ __forceinline__ void best(int count, int forced, const SeenKeys& seen) {
    clear_bins();
    if (threadIdx.x == 0) shared.num_few = 0;
    const bool some = seen.best != kNoKey;
    const uint32_t warp_low = __reduce_min_sync(kFullMask, seen.least_less_one + some);
    const uint32_t warp_worst = __reduce_min_sync(kFullMask, some ? seen.best : kForcedKey);
    const uint32_t warp_high = __reduce_max_sync(kFullMask, seen.best);
    if (lane == 0) shared.low[warp] = warp_low, shared.worst_best[warp] = warp_worst, shared.high[warp] = warp_high;
    // Threads that have candidates have one each that is no worse than the worst of their best.
    const bool enough = __syncthreads_count(some) >= count - forced;
    uint32_t low = __reduce_min_sync(kFullMask, (enough ? shared.worst_best : shared.low)[lane % kWarps]);
    uint32_t high = __reduce_max_sync(kFullMask, shared.high[lane % kWarps]);
    int above = forced, shift;  // keys above high
    Bin bin;
    while (true) {
      const uint32_t range = high - low;
      shift = max(0, 32 - __clz(range) - 8);
      each([&](int, const uint32_t (&x)[kLaneKeys]) {
        const unsigned bins = static_cast<unsigned>(__cvta_generic_to_shared(shared.bins));
#pragma unroll
        for (int j = 0; j < kLaneKeys; ++j)
          asm volatile("{.reg .pred p; setp.le.u32 p, %0, %1; @p red.shared.add.u32 [%2], 1;}" ::"r"(x[j] - low),
                       "r"(range), "r"(bins + ((x[j] - low) >> shift) * 4)
                       : "memory");
      });
      __syncthreads();
      bin = find_bin(count - above);
      above += bin.above;
      low += static_cast<uint32_t>(bin.number) << shift;
      high = low + min(high - low, (1u << shift) - 1);
      if (bin.count <= kFewKeys || shift == 0) break;
      __syncthreads();
      clear_bins();
      __syncthreads();
    }

    // Of the bin.count keys from low to high so many get in, and all above.
    const int left = count - above;
    const bool are_few = bin.count <= kFewKeys;
    int mine = 0;
    each([&](int i, const uint32_t (&x)[kLaneKeys]) {
#pragma unroll
      for (int j = 0; j < kLaneKeys; ++j) mine += x[j] > high;
      if (are_few) keep_few(i, x, low, high - low);
    });
    int until = sum_up_to_lane(mine);
    if (lane == kWarpSize - 1) shared.sums[warp] = until;
    __syncthreads();
    int place = sum_before(until, mine), last_tie;
    uint32_t threshold = high;
    if (are_few) {
      const uint2 own = lane < bin.count ? shared.few[lane] : uint2{kNoKey, 0xffffffffu};
      int rank = 0;
#pragma unroll 4
      for (int i = 0; i < bin.count; ++i) {
        const uint2 other = shared.few[i];
        rank += other.x > own.x || (other.x == own.x && other.y < own.y);
      }
      const unsigned in = __ballot_sync(kFullMask, lane < bin.count && rank < left);
      const int last = __ffs(__ballot_sync(kFullMask, lane < bin.count && rank == left - 1)) - 1;
      threshold = __shfl_sync(kFullMask, own.x, last), last_tie = __shfl_sync(kFullMask, static_cast<int>(own.y), last);
#pragma unroll 4
      for (int i = 0; i < bin.count; ++i) place += (in >> i & 1) && static_cast<int>(shared.few[i].y) < first;
    } else {
      int ties = 0;
      each([&](int, const uint32_t (&x)[kLaneKeys]) {
#pragma unroll
        for (int j = 0; j < kLaneKeys; ++j) ties += x[j] == threshold;
      });
      __syncthreads();
      until = sum_up_to_lane(ties);
      if (lane == kWarpSize - 1) shared.sums[warp] = until;
      __syncthreads();
      int tie = sum_before(until, ties);
      place += min(tie, left);
      each([&](int i, const uint32_t (&x)[kLaneKeys]) {
#pragma unroll
        for (int j = 0; j < kLaneKeys; ++j)
          if (x[j] == threshold && ++tie == left) shared.last_tie = i + j;
      });
      __syncthreads();
      last_tie = shared.last_tie;
    }
    each([&](int i, const uint32_t (&x)[kLaneKeys]) {
#pragma unroll
      for (int j = 0; j < kLaneKeys; ++j)
        if (x[j] > threshold || (x[j] == threshold && i + j <= last_tie)) take(place++, i + j);
    });
  }
};

// Of n keys the forced ones and the best of the rest, `count` in all, more than the forced and less than n:
// take(place, i), places in the order of i. By all threads of the block, each with what it has seen and, when it comes
// here, no keys of other threads to read or write.
template <int kThreads, class Keys, class Take>
__device__ __forceinline__ void select_best(
    int n, int count, int forced, const SeenKeys& seen, SelectShared<kThreads>& shared, Keys keys, Take take) {
  Selection<kThreads, Keys, Take>{n, shared, keys, take}.best(count, forced, seen);
}

}  // namespace quest::cuda
