// The k best of n keys by one block, exactly, for decode_step.
//
// The threshold is closed in on by counting the keys from three pivots on, which quarter the range that still holds it:
// no histogram, whose atomics would wait for one another, and no candidate list, which could overflow where keys
// cluster. Once a warp can hold what is left in the range, it counts ranks. Each warp owns a contiguous run of keys, so
// that the places of what gets in follow from counts.
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

template <int kThreads>
struct SelectShared {
  static constexpr int kWarps = kThreads / kWarpSize;
  uint32_t low[kWarps], high[kWarps];
  int3 pivots[2][kWarps];
  int2 counts[kWarps];
  uint32_t few[kWarpSize];
  int num_few, equals;
  uint32_t threshold;
};

// key(i): of candidate i, kNoKey where there is none; asked for i < n only.
template <int kThreads, class Key, class Take>
struct Selection {
  static constexpr int kWarps = kThreads / kWarpSize;
  int n, sink, recent;  // the first `sink` and the last `recent` get in; those between are candidates
  SelectShared<kThreads>& shared;
  Key key;
  Take take;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int run = (n + kThreads - 1) / kThreads * kWarpSize;

  // visit(i, key): the warp's run in order, all lanes together; past n with kNoKey.
  template <class Visit>
  __device__ __forceinline__ void each(Visit&& visit) {
    const int end = min((warp + 1) * run, n);
#pragma unroll 2
    for (int first = warp * run; first < end; first += kWarpSize) {
      const int i = first + lane;
      visit(i, i < n ? key(i) : kNoKey);
    }
  }

  // Candidates above `threshold` get in, and the first `equals` that equal it: `want` >= 1 in all.
  __device__ __forceinline__ void find_threshold(int want, uint32_t& threshold, int& equals) {
    uint32_t low = 0xffffffffu, high = 0;
    each([&](int, uint32_t x) { low = min(low, x - 1), high = max(high, x); });  // kNoKey - 1 is the largest number
    low = __reduce_min_sync(kFullMask, low), high = __reduce_max_sync(kFullMask, high);
    if (lane == 0) shared.low[warp] = low, shared.high[warp] = high;
    if (threadIdx.x == 0) shared.num_few = 0;
    __syncthreads();
    low = __reduce_min_sync(kFullMask, shared.low[lane % kWarps]) + 1;
    high = __reduce_max_sync(kFullMask, shared.high[lane % kWarps]);

    // The threshold is in [low, high]; so many keys are >= low, and > high.
    int from_low = n - sink - recent, above_high = 0;
    for (int round = 0; low != high && from_low - above_high > kWarpSize; ++round) {
      const uint32_t quarter = max(1u, (high - low) / 4);
      const uint32_t a = low + quarter, b = a + min(quarter, high - a), c = b + min(quarter, high - b);
      int3 count{};
      each([&](int, uint32_t x) {
        count.x += __popc(__ballot_sync(kFullMask, x >= a));
        count.y += __popc(__ballot_sync(kFullMask, x >= b));
        count.z += __popc(__ballot_sync(kFullMask, x >= c));
      });
      if (lane == 0) shared.pivots[round % 2][warp] = count;
      __syncthreads();
      count = lane < kWarps ? shared.pivots[round % 2][lane] : int3{};
      count.x = __reduce_add_sync(kFullMask, count.x);
      count.y = __reduce_add_sync(kFullMask, count.y);
      count.z = __reduce_add_sync(kFullMask, count.z);
      if (count.z >= want)
        low = c, from_low = count.z;
      else if (count.y >= want)
        low = b, from_low = count.y, high = c - 1, above_high = count.z;
      else if (count.x >= want)
        low = a, from_low = count.x, high = b - 1, above_high = count.y;
      else
        high = a - 1, above_high = count.x;
    }
    threshold = low, equals = want - above_high;
    if (low == high) return;

    each([&](int, uint32_t x) {
      if (x >= low && x <= high) shared.few[atomicAdd(&shared.num_few, 1)] = x;
    });
    __syncthreads();
    if (warp == 0) {
      const int in_range = from_low - above_high, left = want - above_high;
      const uint32_t mine = lane < in_range ? shared.few[lane] : kNoKey;
      int above = 0, same = 0;
#pragma unroll 2
      for (int i = 0; i < in_range; ++i) {
        const uint32_t other = shared.few[i];
        above += other > mine, same += other == mine;
      }
      if (lane < in_range && above < left && above + same >= left)
        shared.threshold = mine, shared.equals = left - above;
    }
    __syncthreads();
    threshold = shared.threshold, equals = shared.equals;
  }

  // Calls take(place, i) for all that get in, `count` < n of them, places in the order of i.
  __device__ __forceinline__ void best(int count) {
    const int want = count - sink - recent;
    uint32_t threshold = 0xffffffffu;
    int equals = 0;  // where nothing is wanted no key gets in
    if (want > 0) find_threshold(want, threshold, equals);

    const auto forced = [&](int i) { return i < sink || (i >= n - recent && i < n); };
    int2 mine{};
    each([&](int i, uint32_t x) {
      mine.x += __popc(__ballot_sync(kFullMask, x > threshold || forced(i)));
      mine.y += __popc(__ballot_sync(kFullMask, x == threshold));
    });
    if (lane == 0) shared.counts[warp] = mine;
    __syncthreads();
    const int2 other = lane < warp ? shared.counts[lane] : int2{};
    int above = __reduce_add_sync(kFullMask, other.x), equal = __reduce_add_sync(kFullMask, other.y);
    const unsigned lower_lanes = (1u << lane) - 1;
    each([&](int i, uint32_t x) {
      const bool gets_in = x > threshold || forced(i), ties = x == threshold;
      const unsigned all_in = __ballot_sync(kFullMask, gets_in), all_ties = __ballot_sync(kFullMask, ties);
      const int equal_before = equal + __popc(all_ties & lower_lanes);
      if (gets_in || (ties && equal_before < equals))
        take(above + __popc(all_in & lower_lanes) + min(equal_before, equals), i);
      above += __popc(all_in), equal += __popc(all_ties);
    });
  }
};

// Of n keys the first `sink`, the last `recent` and the best of the rest, `count` < n in all: take(place, i), places in
// the order of i. By all threads of the block.
template <int kThreads, class Key, class Take>
__device__ __forceinline__ void select_best(
    int n, int count, int sink, int recent, SelectShared<kThreads>& shared, Key key, Take take) {
  Selection<kThreads, Key, Take>{n, sink, recent, shared, key, take}.best(count);
}

}  // namespace quest::cuda
