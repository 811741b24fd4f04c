// The k best of n keys by one block, exactly: what topk_pages and decode_step share.
//
// The threshold is closed in on by counting the keys from three pivots on, which quarter the range that still holds it:
// no histogram, whose atomics would wait for one another, and no candidate list, which could overflow where keys cluster.
// Once a warp can hold what is left in the range, it counts ranks.
//
// Each warp owns a contiguous run of keys, and in each stretch of them a lane owns kLaneKeys neighbours, so
// that the places of what gets in follow from counts.
#pragma once

#include "elements.cuh"

namespace quest::cuda {

// Few threads take many keys each, so that a row of 2,048 keeps all of them busy.
constexpr int lane_keys(int threads) { return threads <= 256 ? 8 : 4; }
constexpr int kStretch = kWarpSize * lane_keys(0);  // the longer one

// Unsigned keys in the order of the floats: -0 equals +0, NaN is above everything.
__device__ __forceinline__ uint32_t sort_key(float x) {
  if (x != x) return 0xffffffffu;
  const uint32_t bits = __float_as_uint(x + 0.f);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

// Below the key of any number: what is no candidate.
constexpr uint32_t kNoKey = 0;

// A lane's keys from memory that is aligned to 16 bytes.
template <int kLaneKeys>
__device__ __forceinline__ void load_keys(const uint32_t* from, uint32_t (&keys)[kLaneKeys]) {
#pragma unroll
  for (int i = 0; i < kLaneKeys; i += 4) {
    const uint4 x = *reinterpret_cast<const uint4*>(from + i);
    keys[i] = x.x, keys[i + 1] = x.y, keys[i + 2] = x.z, keys[i + 3] = x.w;
  }
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

// load(i, keys) loads keys i, ..., i + kLaneKeys - 1: kNoKey where there is no candidate, past n too.
template <int kThreads, class Load, class Take>
struct Selection {
  static constexpr int kWarps = kThreads / kWarpSize, kLaneKeys = lane_keys(kThreads), kStretch = kWarpSize * kLaneKeys;
  int n, sink, recent;  // the first `sink` and the last `recent` get in; those between are candidates
  SelectShared<kThreads>& shared;
  Load load;
  Take take;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int run = (n + kWarps * kStretch - 1) / (kWarps * kStretch) * kStretch;

  // visit(i, keys): all stretches of the warp's run, in order.
  template <class Visit>
  __device__ __forceinline__ void each(Visit&& visit) {
    for (int i = warp * run; i < min((warp + 1) * run, n); i += kStretch) {
      uint32_t keys[kLaneKeys];
      load(i + lane * kLaneKeys, keys);
      visit(i + lane * kLaneKeys, keys);
    }
  }
  __device__ __forceinline__ bool candidate(int i) const { return i >= sink && i < n - recent; }

  // Candidates above `threshold` get in, and the first `equals` that equal it: `want` >= 1 in all.
  __device__ __forceinline__ void find_threshold(int want, uint32_t& threshold, int& equals) {
    uint32_t low = 0xffffffffu, high = 0;
    each([&](int, const uint32_t (&keys)[kLaneKeys]) {
#pragma unroll
      for (int j = 0; j < kLaneKeys; ++j) low = min(low, keys[j] - 1), high = max(high, keys[j]);  // kNoKey - 1 is large
    });
    low = __reduce_min_sync(kFullMask, low), high = __reduce_max_sync(kFullMask, high);
    if (lane == 0) shared.low[warp] = low, shared.high[warp] = high;
    if (threadIdx.x == 0) shared.num_few = 0;
    __syncthreads();
    low = __reduce_min_sync(kFullMask, shared.low[lane % kWarps]) + 1;
    high = __reduce_max_sync(kFullMask, shared.high[lane % kWarps]);

    // The threshold is in [low, high]; so many keys are >= low, and > high.
    int from_low = n - sink - recent, above_high = 0;
    for (int round = 0; low != high && from_low - above_high > kWarpSize; ++round) {
      const uint32_t range = high - low;
      const auto part = [&](int quarters) { return low + max(1u, uint32_t(uint64_t{range} * quarters / 4)); };
      const uint32_t pivot[3] = {part(1), part(2), part(3)};
      int3 count{};
      each([&](int, const uint32_t (&keys)[kLaneKeys]) {
#pragma unroll
        for (int j = 0; j < kLaneKeys; ++j)
          count.x += keys[j] >= pivot[0], count.y += keys[j] >= pivot[1], count.z += keys[j] >= pivot[2];
      });
      const auto sum = [&](int3 x) {
        return int3{
            __reduce_add_sync(kFullMask, x.x), __reduce_add_sync(kFullMask, x.y), __reduce_add_sync(kFullMask, x.z)};
      };
      count = sum(count);
      if (lane == 0) shared.pivots[round % 2][warp] = count;
      __syncthreads();
      count = sum(lane < kWarps ? shared.pivots[round % 2][lane] : int3{});
      if (count.z >= want)
        low = pivot[2], from_low = count.z;
      else if (count.y >= want)
        low = pivot[1], from_low = count.y, high = pivot[2] - 1, above_high = count.z;
      else if (count.x >= want)
        low = pivot[0], from_low = count.x, high = pivot[1] - 1, above_high = count.y;
      else
        high = pivot[0] - 1, above_high = count.x;
    }
    threshold = low, equals = want - above_high;
    if (low == high) return;

    each([&](int, const uint32_t (&keys)[kLaneKeys]) {
#pragma unroll
      for (int j = 0; j < kLaneKeys; ++j)
        if (keys[j] >= low && keys[j] <= high) shared.few[atomicAdd(&shared.num_few, 1)] = keys[j];
    });
    __syncthreads();
    if (warp == 0) {
      const int in_range = from_low - above_high, left = want - above_high;
      const uint32_t mine = lane < in_range ? shared.few[lane] : kNoKey;
      int above = 0, same = 0;
#pragma unroll 8
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

    const auto is_above = [&](int i, uint32_t key) { return key > threshold || (i < n && !candidate(i)); };
    const auto is_equal = [&](uint32_t key) { return equals > 0 && key == threshold; };
    const auto count_lane = [&](int i, const uint32_t (&keys)[kLaneKeys]) {
      int2 result{};
#pragma unroll
      for (int j = 0; j < kLaneKeys; ++j) result.x += is_above(i + j, keys[j]), result.y += is_equal(keys[j]);
      return result;
    };
    int2 mine{};
    each([&](int i, const uint32_t (&keys)[kLaneKeys]) {
      const int2 counts = count_lane(i, keys);
      mine.x += counts.x, mine.y += counts.y;
    });
    mine.x = __reduce_add_sync(kFullMask, mine.x), mine.y = __reduce_add_sync(kFullMask, mine.y);
    if (lane == 0) shared.counts[warp] = mine;
    __syncthreads();
    int2 before = lane < warp ? shared.counts[lane] : int2{};
    before.x = __reduce_add_sync(kFullMask, before.x), before.y = __reduce_add_sync(kFullMask, before.y);
    each([&](int i, const uint32_t (&keys)[kLaneKeys]) {
      const int2 own = count_lane(i, keys);
      int2 upto = own;
#pragma unroll
      for (int step = 1; step < kWarpSize; step *= 2) {
        const int x = __shfl_up_sync(kFullMask, upto.x, step), y = __shfl_up_sync(kFullMask, upto.y, step);
        if (lane >= step) upto.x += x, upto.y += y;
      }
      int above = before.x + upto.x - own.x, equal = before.y + upto.y - own.y;
      before.x += __shfl_sync(kFullMask, upto.x, kWarpSize - 1);
      before.y += __shfl_sync(kFullMask, upto.y, kWarpSize - 1);
#pragma unroll
      for (int j = 0; j < kLaneKeys; ++j) {
        const bool gets_in = is_above(i + j, keys[j]), ties = is_equal(keys[j]);
        if (gets_in || (ties && equal < equals)) take(above + min(equal, equals), i + j);
        above += gets_in, equal += ties;
      }
    });
  }
};

// Of n keys the first `sink`, the last `recent` and the best of the rest, `count` < n in all: take(place, i), places in
// the order of i. By all threads of the block.
template <int kThreads, class Load, class Take>
__device__ __forceinline__ void select_best(
    int n, int count, int sink, int recent, SelectShared<kThreads>& shared, Load load, Take take) {
  Selection<kThreads, Load, Take>{n, sink, recent, shared, load, take}.best(count);
}

}  // namespace quest::cuda
