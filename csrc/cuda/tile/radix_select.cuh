// Exact selection of the k best of n keys by one block, for decode_step and topk_pages.
//
// The range that holds the threshold is cut into bins, the keys of each bin are counted, and the bin that holds the
// threshold is the next range. It ends when a warp can rank the keys left, or all of them are equal. No candidate list
// exists, so none can overflow where keys cluster. Where each thread's best is a candidate, and k is at most the number
// of threads, the threshold is not below the worst of those: the first range is small already.
//
// A thread owns consecutive keys, so prefix sums give the place of each selected key.
//
// One block does this while others wait, so its longest chain of dependent instructions is its time. Warps repeat a
// search rather than share its result over a barrier, and passes over all keys do not branch on any.
#pragma once

#include "../core/elements.cuh"
#include "../core/ptx.cuh"

namespace quest::cuda {

// Candidate keys lie strictly between kNoKey and kForcedKey, which is selected whatever the other keys are.
constexpr uint32_t kNoKey = 0, kForcedKey = 0xffffffffu;

// Unsigned keys in the order of the floats: -0 equals +0, and NaN is above all numbers.
__device__ __forceinline__ uint32_t sort_key(float x) {
  const uint32_t bits = __float_as_uint(x + 0.f);
  return x != x ? kForcedKey - 1 : bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

constexpr int kSelectBins = 256;
constexpr int kLaneBins = kSelectBins / kWarpSize;
constexpr int kMaxRanked = kWarpSize;  // keys that a warp ranks by itself

template <int kThreads>
struct SelectShared {
  static constexpr int kWarps = kThreads / kWarpSize;
  alignas(16) int bins[kSelectBins];
  uint32_t low[kWarps], worst_best[kWarps], high[kWarps];
  int above[kWarps], within[kWarps];
  uint32_t ranked[kMaxRanked];  // in the order of their indices
};

// Keys are read in vectors of four.
constexpr int kVecKeys = 4;
constexpr int kWordVecs = 32 / kVecKeys;  // vectors whose keys have a bit each in one word

// Vectors that each thread owns of n keys.
template <int kThreads>
__host__ __device__ __forceinline__ int vecs_per_thread(int n) {
  return (n + kVecKeys * kThreads - 1) / (kVecKeys * kThreads);
}

__device__ __forceinline__ int inclusive_sum(int x) {
#pragma unroll
  for (int step = 1; step < kWarpSize; step *= 2) {
    const int other = __shfl_up_sync(kFullMask, x, step);
    if (static_cast<int>(threadIdx.x % kWarpSize) >= step) x += other;
  }
  return x;
}

// The extremes of the candidates among a thread's keys.
struct KeyRange {
  uint32_t best = kNoKey, least_minus_one = 0xffffffffu;
  __device__ __forceinline__ void add(uint32_t key) {
    if (key != kForcedKey) best = max(best, key);
    least_minus_one = min(least_minus_one, key - 1);  // kNoKey - 1 is the largest number
  }
  __device__ __forceinline__ void add(uint4 keys) { add(keys.x), add(keys.y), add(keys.z), add(keys.w); }
};

// keys(j): the j-th vector of this thread's keys, whose first has index 4 * (vecs_per_thread * thread + j); kNoKey past
// n.
template <int kThreads, class Keys, class Emit>
struct Selection {
  static constexpr int kWarps = kThreads / kWarpSize;
  static_assert(kWarps <= kWarpSize);
  const int n;
  SelectShared<kThreads>& shared;
  Keys keys;
  Emit emit;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int vecs = vecs_per_thread<kThreads>(n), first = vecs * kVecKeys * static_cast<int>(threadIdx.x);
  uint32_t low = kNoKey, high = kNoKey;  // the range that holds the threshold

  __device__ __forceinline__ int words() const { return (vecs + kWordVecs - 1) / kWordVecs; }
  // visit(j, keys): the j-th vector of word w.
  template <class Visit>
  __device__ __forceinline__ void each_vec(int w, Visit&& visit) const {
    const int end = min(kWordVecs, vecs - w * kWordVecs);
#pragma unroll 2
    for (int j = 0; j < end; ++j) {
      const uint4 vec = keys(w * kWordVecs + j);
      const uint32_t x[kVecKeys] = {vec.x, vec.y, vec.z, vec.w};
      visit(j, x);
    }
  }
  // The keys of a word that are above the range, and those within.
  struct Masks {
    unsigned above = 0, within = 0;
  };
  __device__ __forceinline__ Masks masks(int w) const {
    Masks bits;
    each_vec(w, [&](int j, const uint32_t (&x)[kVecKeys]) {
      unsigned above = 0, within = 0;
#pragma unroll
      for (int e = 0; e < kVecKeys; ++e) {
        if (x[e] > high) above |= 1u << e;
        if (x[e] - low <= high - low) within |= 1u << e;
      }
      bits.above |= above << kVecKeys * j, bits.within |= within << kVecKeys * j;
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
  // The bin in which the count of keys, from the highest bin down, reaches `want`. Each warp finds it by itself.
  __device__ __forceinline__ Bin find_bin(int want) const {
    static_assert(kLaneBins == 8);
    const int4* const vecs = reinterpret_cast<const int4*>(shared.bins) + 2 * (kWarpSize - 1 - lane);
    const int4 b = vecs[0], a = vecs[1];
    const int count[kLaneBins] = {a.w, a.z, a.y, a.x, b.w, b.z, b.y, b.x};
    const int sum = ((a.x + a.y) + (a.z + a.w)) + ((b.x + b.y) + (b.z + b.w));
    const int until = inclusive_sum(sum);
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
  __device__ __forceinline__ void find_range(int count, const KeyRange& own) {
    const bool some = own.best != kNoKey;
    const uint32_t warp_low = __reduce_min_sync(kFullMask, own.least_minus_one + some);
    const uint32_t warp_worst = __reduce_min_sync(kFullMask, some ? own.best : kForcedKey);
    const uint32_t warp_high = __reduce_max_sync(kFullMask, own.best);
    if (lane == 0) shared.low[warp] = warp_low, shared.worst_best[warp] = warp_worst, shared.high[warp] = warp_high;
    // Enough threads with a candidate have one each that is no worse than the worst of their best.
    const bool enough = __syncthreads_count(some) >= count;
    low = __reduce_min_sync(kFullMask, (enough ? shared.worst_best : shared.low)[lane % kWarps]);
    high = __reduce_max_sync(kFullMask, shared.high[lane % kWarps]);
  }

  // Calls emit(place, i) for the `count` < n selected keys, forced ones among them; places in the order of i.
  __device__ __forceinline__ void run(int count, int forced, const KeyRange& own) {
    clear_bins();
    find_range(count - forced, own);
    int above = forced, shift;  // keys above high
    Bin bin;
#pragma unroll 1
    while (true) {
      const uint32_t range = high - low;
      shift = max(0, 32 - __clz(range) - 8);
#pragma unroll 1
      for (int w = 0; w < words(); ++w)
        each_vec(w, [&](int, const uint32_t (&x)[kVecKeys]) {
          const unsigned bins = shared_address(shared.bins);
#pragma unroll
          for (int e = 0; e < kVecKeys; ++e) count_if_at_most(x[e] - low, range, bins + ((x[e] - low) >> shift) * 4);
        });
      __syncthreads();
      bin = find_bin(count - above);
      above += bin.above;
      low += static_cast<uint32_t>(bin.number) << shift;
      high = low + min(high - low, (1u << shift) - 1);
      if (bin.count <= kMaxRanked || shift == 0) break;
      __syncthreads();
      clear_bins();
      __syncthreads();
    }

    // Of the bin.count keys within the range, `left` are selected; of those above, all.
    const int left = count - above;
    Masks bits;
    int own_above = 0, own_within = 0;
#pragma unroll 1
    for (int w = 0; w < words(); ++w) {
      bits = masks(w);
      own_above += __popc(bits.above), own_within += __popc(bits.within);
    }
    const int until_above = inclusive_sum(own_above), until_within = inclusive_sum(own_within);
    if (lane == kWarpSize - 1) shared.above[warp] = until_above, shared.within[warp] = until_within;
    __syncthreads();
    int place = __reduce_add_sync(kFullMask, lane < warp ? shared.above[lane] : 0) + until_above - own_above;
    int candidate = __reduce_add_sync(kFullMask, lane < warp ? shared.within[lane] : 0) + until_within - own_within;

    // Few keys within the range are ranked, by each warp; more are all equal, and the first ones win.
    const bool rank = bin.count <= kMaxRanked;
    unsigned winners = 0;
    if (rank) {
      int at = candidate;
#pragma unroll 1
      for (int w = 0; own_within && w < words(); ++w)
#pragma unroll 1
        for (unsigned in = words() == 1 ? bits.within : masks(w).within; in; in &= in - 1)
          shared.ranked[at++] = key_of(w, __ffs(in) - 1);
      __syncthreads();
      const uint32_t mine = lane < bin.count ? shared.ranked[lane] : kNoKey;
      int better = __popc(__match_any_sync(kFullMask, mine) & ((1u << lane) - 1));
#pragma unroll 4
      for (int i = 0; i < bin.count; ++i) better += __shfl_sync(kFullMask, mine, i) > mine;
      winners = __ballot_sync(kFullMask, lane < bin.count && better < left);
      place += __popc(winners & ((1ull << candidate) - 1));
    } else {
      place += min(candidate, left);
    }
#pragma unroll 1
    for (int w = 0; w < words(); ++w) {
      if (words() > 1) bits = masks(w);
#pragma unroll 1
      for (unsigned in = bits.above | bits.within; in; in &= in - 1) {
        const int bit = __ffs(in) - 1;
        bool selected = bits.above >> bit & 1;
        if (!selected) {
          selected = rank ? winners >> candidate & 1 : candidate < left;
          ++candidate;
        }
        if (selected) emit(place++, first + w * kWordVecs * kVecKeys + bit);
      }
    }
  }
  __device__ __forceinline__ uint32_t key_of(int w, int bit) const {
    const uint4 x = keys(w * kWordVecs + bit / kVecKeys);
    return bit & 2 ? (bit & 1 ? x.w : x.z) : bit & 1 ? x.y : x.x;
  }
};

// Of n keys the forced ones and the best of the rest, `count` in all: more than the forced and less than n.
// emit(place, i): places in the order of i. By all threads of the block; own: the range of the thread's keys.
template <int kThreads, class Keys, class Emit>
__device__ __forceinline__ void select_best(
    int n, int count, int forced, const KeyRange& own, SelectShared<kThreads>& shared, Keys keys, Emit emit) {
  Selection<kThreads, Keys, Emit>{.n = n, .shared = shared, .keys = keys, .emit = emit}.run(count, forced, own);
}

}  // namespace quest::cuda
