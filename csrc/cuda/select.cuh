// The k best of n keys by one block, exactly: what decode_step and topk_pages share.
//
// The range that holds the threshold is cut into as many bins as there are counters, the keys in each are counted, and
// the bin that holds it is the next range, until so few are left that each warp can rank them by itself. The first
// range is small already: where no more keys are wanted than there are threads, each thread's best is a candidate, so
// the threshold is not below the worst of those. No candidate list is kept that could overflow where keys cluster. Each
// warp owns a contiguous run of keys, so that the places of what gets in follow from counts.
//
// The loops are left rolled: this code runs once, and its instructions come slower than they are executed.
#pragma once

#include "elements.cuh"

namespace quest::cuda {

// Below the key of any number: what is no candidate.
constexpr uint32_t kNoKey = 0;

// Unsigned keys in the order of the floats: -0 equals +0, NaN is above everything.
__device__ __forceinline__ uint32_t sort_key(float x) {
  if (x != x) return 0xffffffffu;
  const uint32_t bits = __float_as_uint(x + 0.f);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

constexpr int kSelectBins = 1024;

template <int kThreads>
struct SelectShared {
  static constexpr int kWarps = kThreads / kWarpSize;
  int bins[kSelectBins];  // free once the threshold is known
  uint32_t low[kWarps], high[kWarps];
  int sums[kWarps];
  uint32_t few[kWarpSize];
  int num_few, bin, above_bin, in_bin, last_tie;
};

// What a thread has seen of the candidates, whichever they are, when the threads have seen them all once.
struct SeenKeys {
  uint32_t best = kNoKey, least_less_one = 0xffffffffu;
  __device__ __forceinline__ void see(uint32_t key) {
    best = max(best, key);
    least_less_one = min(least_less_one, key - 1);  // kNoKey - 1 is the largest number
  }
};

constexpr int kLaneKeys = 4;

// keys(i): those of candidates i to i + 3 where i < n, kNoKey where there is none.
template <int kThreads, class Keys, class Take>
struct Selection {
  static constexpr int kWarps = kThreads / kWarpSize, kThreadBins = kSelectBins / kThreads;
  static_assert(kThreadBins * kThreads == kSelectBins && kWarps <= kWarpSize);
  int n, sink, recent;  // the first `sink` and the last `recent` get in; those between are candidates
  SelectShared<kThreads>& shared;
  Keys keys;
  Take take;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int run = (n + kLaneKeys * kThreads - 1) / (kLaneKeys * kThreads) * kLaneKeys * kWarpSize;

  // visit(i, keys): four candidates from i on for each lane, lanes in order; past n with kNoKey. Read before they are
  // visited: what a visit writes would else be waited for.
  template <class Visit>
  __device__ __forceinline__ void each(Visit&& visit) {
    const int end = min((warp + 1) * run, n);
#pragma unroll 1
    for (int first = warp * run; first < end; first += kLaneKeys * kWarpSize) {
      const int i = first + lane * kLaneKeys;
      uint4 four{kNoKey, kNoKey, kNoKey, kNoKey};
      if (i < n) four = keys(i);
      const uint32_t x[kLaneKeys] = {four.x, four.y, four.z, four.w};
      visit(i, x);
    }
  }

  __device__ __forceinline__ void clear_bins() {
#pragma unroll
    for (int i = 0; i < kThreadBins; ++i) shared.bins[threadIdx.x + i * kThreads] = 0;
  }

  // The bin, counted from the highest, in which the count of keys reaches `want`. By all threads, after a barrier.
  __device__ __forceinline__ void find_bin(int want) {
    int count[kThreadBins], sum = 0;
#pragma unroll
    for (int i = 0; i < kThreadBins; ++i)
      sum += count[i] = shared.bins[kSelectBins - 1 - (static_cast<int>(threadIdx.x) * kThreadBins + i)];
    int above = sum;
#pragma unroll
    for (int step = 1; step < kWarpSize; step *= 2) {
      const int other = __shfl_up_sync(kFullMask, above, step);
      if (lane >= step) above += other;
    }
    if (lane == kWarpSize - 1) shared.sums[warp] = above;
    __syncthreads();
    above += __reduce_add_sync(kFullMask, lane < warp ? shared.sums[lane] : 0) - sum;
#pragma unroll
    for (int i = 0; i < kThreadBins; ++i) {
      if (above < want && above + count[i] >= want) {
        shared.bin = kSelectBins - 1 - (static_cast<int>(threadIdx.x) * kThreadBins + i);
        shared.above_bin = above, shared.in_bin = count[i];
      }
      above += count[i];
    }
    __syncthreads();
  }

  // Candidates above `threshold` get in, and the first `equals` of the `ties` that equal it: `want` >= 1 in all.
  __device__ __forceinline__ void find_threshold(
      int want, const SeenKeys& seen, uint32_t& threshold, int& equals, int& ties) {
    clear_bins();
    if (threadIdx.x == 0) shared.num_few = 0;
    const uint32_t bound = want <= kThreads ? seen.best : seen.least_less_one + 1;
    const uint32_t warp_low = __reduce_min_sync(kFullMask, bound), warp_high = __reduce_max_sync(kFullMask, seen.best);
    if (lane == 0) shared.low[warp] = warp_low, shared.high[warp] = warp_high;
    __syncthreads();
    // The threshold is in [low, high], of which no part is kNoKey; so many keys are above high.
    uint32_t low = max(1u, __reduce_min_sync(kFullMask, shared.low[lane % kWarps]));
    uint32_t high = __reduce_max_sync(kFullMask, shared.high[lane % kWarps]);
    int above_high = 0, in_range;
    while (true) {
      const int shift = max(0, 32 - __clz(high - low) - 10);
      each([&](int, const uint32_t (&x)[kLaneKeys]) {
#pragma unroll
        for (int j = 0; j < kLaneKeys; ++j)
          if (x[j] >= low && x[j] <= high) atomicAdd(&shared.bins[(x[j] - low) >> shift], 1);
      });
      __syncthreads();
      find_bin(want - above_high);
      in_range = shared.in_bin, above_high += shared.above_bin;
      low += static_cast<uint32_t>(shared.bin) << shift;
      if (shift == 0) {
        threshold = low, equals = want - above_high, ties = in_range;
        return;
      }
      high = low + min(high - low, (1u << shift) - 1);
      if (in_range <= kWarpSize) break;
      clear_bins();
      __syncthreads();
    }

    each([&](int, const uint32_t (&x)[kLaneKeys]) {
#pragma unroll
      for (int j = 0; j < kLaneKeys; ++j)
        if (x[j] >= low && x[j] <= high) shared.few[atomicAdd(&shared.num_few, 1)] = x[j];
    });
    __syncthreads();
    const int left = want - above_high;
    const uint32_t mine = lane < in_range ? shared.few[lane] : kNoKey;
    int above = 0, same = 0;
#pragma unroll 4
    for (int i = 0; i < in_range; ++i) {
      const uint32_t other = shared.few[i];
      above += other > mine, same += other == mine;
    }
    const unsigned is_last = __ballot_sync(kFullMask, lane < in_range && above < left && above + same >= left);
    const int last = __ffs(is_last) - 1;
    threshold = __shfl_sync(kFullMask, mine, last);
    equals = left - __shfl_sync(kFullMask, above, last), ties = __shfl_sync(kFullMask, same, last);
  }

  // The sum of x over the warps before this one.
  __device__ __forceinline__ int sum_before(int x) {
    x = __reduce_add_sync(kFullMask, x);
    __syncthreads();
    if (lane == 0) shared.sums[warp] = x;
    __syncthreads();
    return __reduce_add_sync(kFullMask, lane < warp ? shared.sums[lane] : 0);
  }

  // The place of the last key to get in of those that equal the threshold, where there are more of them than get in.
  __device__ __forceinline__ int find_last_tie(uint32_t threshold, int equals) {
    int ties = 0;
    each([&](int, const uint32_t (&x)[kLaneKeys]) {
#pragma unroll
      for (int j = 0; j < kLaneKeys; ++j) ties += x[j] == threshold;
    });
    int seen = sum_before(ties);
    each([&](int i, const uint32_t (&x)[kLaneKeys]) {
      int mine = 0;
#pragma unroll
      for (int j = 0; j < kLaneKeys; ++j) mine += x[j] == threshold;
      int until = mine;
#pragma unroll
      for (int step = 1; step < kWarpSize; step *= 2) {
        const int other = __shfl_up_sync(kFullMask, until, step);
        if (lane >= step) until += other;
      }
      int tie = seen + until - mine;
#pragma unroll
      for (int j = 0; j < kLaneKeys; ++j)
        if (x[j] == threshold && ++tie == equals) shared.last_tie = i + j;
      seen += __shfl_sync(kFullMask, until, kWarpSize - 1);
    });
    __syncthreads();
    return shared.last_tie;
  }

  // Calls take(place, i) for all that get in, `count` < n of them, places in the order of i.
  __device__ __forceinline__ void best(int count, const SeenKeys& seen) {
    const int want = count - sink - recent;
    uint32_t threshold = 0xffffffffu;
    int equals = 0, ties = 0, last_tie = -1;  // where nothing is wanted no key gets in
    if (want > 0) {
      find_threshold(want, seen, threshold, equals, ties);
      last_tie = ties == equals ? n : find_last_tie(threshold, equals);
    }

    const auto gets_in = [&](int i, uint32_t x) {
      return i < n && (x > threshold || (x == threshold && i <= last_tie) || i < sink || i >= n - recent);
    };
    int in = 0;
    each([&](int i, const uint32_t (&x)[kLaneKeys]) {
#pragma unroll
      for (int j = 0; j < kLaneKeys; ++j) in += gets_in(i + j, x[j]);
    });
    int place = sum_before(in);
    const unsigned lower_lanes = (1u << lane) - 1;
    each([&](int i, const uint32_t (&x)[kLaneKeys]) {
      int mine = place;
      unsigned all[kLaneKeys];
#pragma unroll
      for (int j = 0; j < kLaneKeys; ++j) {
        all[j] = __ballot_sync(kFullMask, gets_in(i + j, x[j]));
        mine += __popc(all[j] & lower_lanes), place += __popc(all[j]);
      }
#pragma unroll
      for (int j = 0; j < kLaneKeys; ++j)
        if (all[j] >> lane & 1) take(mine++, i + j);
    });
  }
};

// Of n keys the first `sink`, the last `recent` and the best of the rest, `count` < n in all: take(place, i), places in
// the order of i. By all threads of the block, each with what it has seen; holds a barrier before it asks for a key.
template <int kThreads, class Keys, class Take>
__device__ __forceinline__ void select_best(
    int n, int count, int sink, int recent, const SeenKeys& seen, SelectShared<kThreads>& shared, Keys keys,
    Take take) {
  __syncthreads();
  Selection<kThreads, Keys, Take>{n, sink, recent, shared, keys, take}.best(count, seen);
}

}  // namespace quest::cuda
