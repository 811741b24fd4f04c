// The k best of n keys by one block, exactly: what decode_step and topk_pages share.
//
// The range that holds the threshold is cut into as many bins as there are counters, the keys in each are counted, and
// the bin that holds it is the next range, until so few are left that each warp can rank them by itself. The first
// range is small already: where no more keys are wanted than there are threads, each thread's best is a candidate, so
// the threshold is not below the worst of those. No candidate list is kept that could overflow where keys cluster.
//
// A thread owns a contiguous run of keys, so that the places of what gets in follow from prefix sums.
//
// This is one block's work for which others wait, and what it costs is the length of its longest chain of instructions:
// so warps find the same thing by themselves where telling them would need a barrier, and passes over all keys do not
// branch on any.
#pragma once

#include "elements.cuh"

namespace quest::cuda {

// Keys of candidates lie between that of what is no candidate and that of what gets in whatever the others are.
constexpr uint32_t kNoKey = 0, kForcedKey = 0xffffffffu;

// Unsigned keys in the order of the floats: -0 equals +0, NaN is above everything.
__device__ __forceinline__ uint32_t sort_key(float x) {
  const uint32_t bits = __float_as_uint(x + 0.f);
  return x != x ? kForcedKey - 1 : bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

constexpr int kSelectBins = 256;
constexpr int kLaneBins = kSelectBins / kWarpSize;
constexpr int kFewKeys = kWarpSize;

template <int kThreads>
struct SelectShared {
  static constexpr int kWarps = kThreads / kWarpSize;
  alignas(16) int bins[kSelectBins];
  uint32_t low[kWarps], worst_best[kWarps], high[kWarps];
  int above[kWarps], within[kWarps];
  uint32_t few[kFewKeys];  // in order
};

constexpr int kLaneKeys = 4;
// So many fours of a thread's keys have a bit each in one word.
constexpr int kWordFours = 32 / kLaneKeys;

// So many times four keys a thread owns.
template <int kThreads>
__host__ __device__ __forceinline__ int own_fours(int n) {
  return (n + kLaneKeys * kThreads - 1) / (kLaneKeys * kThreads);
}

__device__ __forceinline__ int sum_up_to_lane(int x) {
#pragma unroll
  for (int step = 1; step < kWarpSize; step *= 2) {
    const int other = __shfl_up_sync(kFullMask, x, step);
    if (static_cast<int>(threadIdx.x % kWarpSize) >= step) x += other;
  }
  return x;
}

// What a thread has seen of the candidates when it has seen its keys.
struct SeenKeys {
  uint32_t best = kNoKey, least_less_one = 0xffffffffu;
  __device__ __forceinline__ void see(uint32_t key) {
    if (key != kForcedKey) best = max(best, key);
    least_less_one = min(least_less_one, key - 1);  // kNoKey - 1 is the largest number
  }
  __device__ __forceinline__ void see(uint4 keys) { see(keys.x), see(keys.y), see(keys.z), see(keys.w); }
};

// keys(j): the j-th four of this thread's keys, whose first is number 4 (own_fours * thread + j); kNoKey past n.
template <int kThreads, class Keys, class Take>
struct Selection {
  static constexpr int kWarps = kThreads / kWarpSize;
  static_assert(kWarps <= kWarpSize);
  const int n;
  SelectShared<kThreads>& shared;
  Keys keys;
  Take take;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int fours = own_fours<kThreads>(n), first = fours * kLaneKeys * static_cast<int>(threadIdx.x);
  uint32_t low = kNoKey, high = kNoKey;  // the range that holds the threshold

  __device__ __forceinline__ int words() const { return (fours + kWordFours - 1) / kWordFours; }
  // visit(j, keys): the j-th four of word w.
  template <class Visit>
  __device__ __forceinline__ void each_four(int w, Visit&& visit) const {
    const int end = min(kWordFours, fours - w * kWordFours);
#pragma unroll 2
    for (int j = 0; j < end; ++j) {
      const uint4 four = keys(w * kWordFours + j);
      const uint32_t x[kLaneKeys] = {four.x, four.y, four.z, four.w};
      visit(j, x);
    }
  }
  // Which of the keys of a word are above the range, and which within.
  struct Which {
    unsigned above = 0, within = 0;
  };
  __device__ __forceinline__ Which which(int w) const {
    Which bits;
    each_four(w, [&](int j, const uint32_t (&x)[kLaneKeys]) {
      unsigned above = 0, within = 0;
#pragma unroll
      for (int e = 0; e < kLaneKeys; ++e) {
        if (x[e] > high) above |= 1u << e;
        if (x[e] - low <= high - low) within |= 1u << e;
      }
      bits.above |= above << kLaneKeys * j, bits.within |= within << kLaneKeys * j;
    });
    return bits;
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

  // The first range, which holds the worst of the `count` best candidates.
  __device__ __forceinline__ void find_range(int count, const SeenKeys& seen) {
    const bool some = seen.best != kNoKey;
    const uint32_t warp_low = __reduce_min_sync(kFullMask, seen.least_less_one + some);
    const uint32_t warp_worst = __reduce_min_sync(kFullMask, some ? seen.best : kForcedKey);
    const uint32_t warp_high = __reduce_max_sync(kFullMask, seen.best);
    if (lane == 0) shared.low[warp] = warp_low, shared.worst_best[warp] = warp_worst, shared.high[warp] = warp_high;
    // Threads that have candidates have one each that is no worse than the worst of their best.
    const bool enough = __syncthreads_count(some) >= count;
    low = __reduce_min_sync(kFullMask, (enough ? shared.worst_best : shared.low)[lane % kWarps]);
    high = __reduce_max_sync(kFullMask, shared.high[lane % kWarps]);
  }

  // Calls take(place, i) for all that get in, forced keys among them, `count` < n; places in the order of i.
  __device__ __forceinline__ void best(int count, int forced, const SeenKeys& seen) {
    clear_bins();
    find_range(count - forced, seen);
    int above = forced, shift;  // keys above high
    Bin bin;
#pragma unroll 1
    while (true) {
      const uint32_t range = high - low;
      shift = max(0, 32 - __clz(range) - 8);
#pragma unroll 1
      for (int w = 0; w < words(); ++w)
        each_four(w, [&](int, const uint32_t (&x)[kLaneKeys]) {
          const unsigned bins = static_cast<unsigned>(__cvta_generic_to_shared(shared.bins));
#pragma unroll
          for (int e = 0; e < kLaneKeys; ++e)
            asm volatile("{.reg .pred p; setp.le.u32 p, %0, %1; @p red.shared.add.u32 [%2], 1;}" ::"r"(x[e] - low),
                         "r"(range), "r"(bins + ((x[e] - low) >> shift) * 4)
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

    // Of the bin.count keys within the range so many get in, and all above.
    const int left = count - above;
    Which bits;
    int own_above = 0, own_within = 0;
#pragma unroll 1
    for (int w = 0; w < words(); ++w) {
      bits = which(w);
      own_above += __popc(bits.above), own_within += __popc(bits.within);
    }
    const int until_above = sum_up_to_lane(own_above), until_within = sum_up_to_lane(own_within);
    if (lane == kWarpSize - 1) shared.above[warp] = until_above, shared.within[warp] = until_within;
    __syncthreads();
    int place = __reduce_add_sync(kFullMask, lane < warp ? shared.above[lane] : 0) + until_above - own_above;
    int candidate = __reduce_add_sync(kFullMask, lane < warp ? shared.within[lane] : 0) + until_within - own_within;

    // Which of them get in: those that are few are ranked, by each warp; the rest are all the same, and the first do.
    const bool are_few = bin.count <= kFewKeys;
    unsigned winners = 0;
    if (are_few) {
      int at = candidate;
#pragma unroll 1
      for (int w = 0; own_within && w < words(); ++w)
#pragma unroll 1
        for (unsigned in = words() == 1 ? bits.within : which(w).within; in; in &= in - 1)
          shared.few[at++] = key_of(w, __ffs(in) - 1);
      __syncthreads();
      const uint32_t own = lane < bin.count ? shared.few[lane] : kNoKey;
      int better = __popc(__match_any_sync(kFullMask, own) & ((1u << lane) - 1));
#pragma unroll 4
      for (int i = 0; i < bin.count; ++i) better += __shfl_sync(kFullMask, own, i) > own;
      winners = __ballot_sync(kFullMask, lane < bin.count && better < left);
      place += __popc(winners & ((1ull << candidate) - 1));
    } else {
      place += min(candidate, left);
    }
#pragma unroll 1
    for (int w = 0; w < words(); ++w) {
      if (words() > 1) bits = which(w);
#pragma unroll 1
      for (unsigned in = bits.above | bits.within; in; in &= in - 1) {
        const int bit = __ffs(in) - 1;
        bool gets_in = bits.above >> bit & 1;
        if (!gets_in) {
          gets_in = are_few ? winners >> candidate & 1 : candidate < left;
          ++candidate;
        }
        if (gets_in) take(place++, first + w * kWordFours * kLaneKeys + bit);
      }
    }
  }
  __device__ __forceinline__ uint32_t key_of(int w, int bit) const {
    const uint4 x = keys(w * kWordFours + bit / kLaneKeys);
    return bit & 2 ? (bit & 1 ? x.w : x.z) : bit & 1 ? x.y : x.x;
  }
};

// Of n keys the forced ones and the best of the rest, `count` in all, more than the forced and less than n:
// take(place, i), places in the order of i. By all threads of the block, each with what it has seen.
template <int kThreads, class Keys, class Take>
__device__ __forceinline__ void select_best(
    int n, int count, int forced, const SeenKeys& seen, SelectShared<kThreads>& shared, Keys keys, Take take) {
  Selection<kThreads, Keys, Take>{.n = n, .shared = shared, .keys = keys, .take = take}.best(count, forced, seen);
}

}  // namespace quest::cuda
