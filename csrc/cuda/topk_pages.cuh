// topk_pages: a block owns a row. Radix select finds the key of the last page that gets in, eight bits a pass, then one
// ordered pass writes the pages above it and as many of its equals as there is room for, lower pages first. No
// candidate list is ever kept, so nothing can be dropped where scores cluster.
//
// Each warp owns a contiguous run of pages, so that an ordered write needs only the counts of the warps before it. Up
// to kPerThread pages a thread their keys stay in registers; longer rows reduce the scores anew in each pass.
//
// decode_step selects by pivots instead (select.cuh), with the same result: with 1,024 threads that measured slower.
#pragma once

#include "launch_order.cuh"
#include "select.cuh"

namespace quest::cuda {

constexpr int kTopkThreads = 1024;
constexpr int kTopkWarps = kTopkThreads / kWarpSize;
constexpr int kBins = 256;
constexpr float kLog2e = 1.4426950408889634f;

template <class T, class Op>
__device__ __forceinline__ T topk_block_reduce(T x, T* shared, Op op) {
  for (int step = 1; step < kWarpSize; step *= 2) x = op(x, __shfl_xor_sync(kFullMask, x, step));
  __syncthreads();
  if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = x;
  __syncthreads();
  x = shared[threadIdx.x % kWarpSize];
  for (int step = 1; step < kWarpSize; step *= 2) x = op(x, __shfl_xor_sync(kFullMask, x, step));
  return x;
}

// The scores of one row, reduced over the heads that share its list.
struct ReducedScores {
  const float* scores;  // of the first head
  int64_t stride;       // to the next head
  int heads, n;
  GroupReduce how;
  float scale;   // to units of log2(e)
  float* top;    // [heads], soft: the largest scaled score of each head
  float* share;  // [heads], soft: one over the sum of its weights

  __device__ void prepare(float* shared) {
    if (how != GroupReduce::soft) return;
    for (int h = 0; h < heads; ++h) {
      float m = -INFINITY, sum = 0.f;
      for (int i = threadIdx.x; i < n; i += kTopkThreads) m = nan_max(m, scores[h * stride + i] * scale);
      m = topk_block_reduce(m, shared, [](float a, float b) { return nan_max(a, b); });
      for (int i = threadIdx.x; i < n; i += kTopkThreads) sum += exp2f(scores[h * stride + i] * scale - m);
      sum = topk_block_reduce(sum, shared, [](float a, float b) { return a + b; });
      if (threadIdx.x == 0) top[h] = m, share[h] = 1.f / sum;
    }
    __syncthreads();
  }

  __device__ float operator()(int page) const {
    float x = scores[page];
    if (how == GroupReduce::soft) x = exp2f(x * scale - top[0]) * share[0];
    for (int h = 1; h < heads; ++h) {
      const float y = scores[h * stride + page];
      if (how == GroupReduce::max)
        x = nan_max(x, y);
      else if (how == GroupReduce::sum)
        x += y;
      else
        x += exp2f(y * scale - top[h]) * share[h];
    }
    return x;
  }
};

// kPerThread = 0: keys are not kept.
template <int kPerThread>
__global__ void __launch_bounds__(kTopkThreads) topk_pages_kernel(const TopkParams p) {
  extern __shared__ float head_stats[];  // [2, heads]
  __shared__ int bins[kBins];
  __shared__ float reduce_buffer[kTopkWarps];
  __shared__ int warp_above[kTopkWarps], warp_equal[kTopkWarps];
  __shared__ uint32_t chosen_bin;
  __shared__ int left_in_bin;

  wait_for_previous_kernel();
  const int row = blockIdx.x, h = row % p.Hs, t = row / p.Hs % p.size.T, b = row / p.Hs / p.size.T;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  int32_t* const pages = p.pages + int64_t{row} * p.K;
  const int n = p.paging.pages_of(p.paging.visible(b, t, p.size.T));
  if (n <= p.K) {
    for (int i = threadIdx.x; i < p.K; i += kTopkThreads) pages[i] = i < n ? i : -1;
    return;
  }

  const int heads = p.size.Hq / p.Hs;
  ReducedScores reduced{
      p.scores + b * p.stride_b + t * p.stride_t + int64_t{h} * heads * p.stride_h,
      p.stride_h,
      heads,
      n,
      p.reduce,
      p.scale * kLog2e,
      head_stats,
      head_stats + heads};
  reduced.prepare(reduce_buffer);

  const int first_free = p.sink_pages, end_free = n - p.recent_pages;  // forced pages are no candidates
  const int rounds = (n + kTopkThreads - 1) / kTopkThreads;
  const auto page_of = [&](int i) { return (warp * rounds + i) * kWarpSize + lane; };
  const auto is_candidate = [&](int page) { return page >= first_free && page < end_free; };
  uint32_t keys[kPerThread ? kPerThread : 1];
  if constexpr (kPerThread > 0) {
#pragma unroll
    for (int i = 0; i < kPerThread; ++i)
      keys[i] = i < rounds && is_candidate(page_of(i)) ? sort_key(reduced(page_of(i))) : 0;
  }
  const auto each_page = [&](auto&& visit) {  // visit(page, key), in order, all lanes together
    if constexpr (kPerThread > 0) {
#pragma unroll
      for (int i = 0; i < kPerThread; ++i)
        if (i < rounds) visit(page_of(i), keys[i]);
    } else {
      for (int i = 0; i < rounds; ++i) {
        const int page = page_of(i);
        visit(page, is_candidate(page) ? sort_key(reduced(page)) : 0);
      }
    }
  };

  // The key of the last candidate to get in, and how many of its equals do.
  uint32_t threshold = 0;
  int left = p.K - p.sink_pages - p.recent_pages;
  if (left > 0) {
#pragma unroll 1
    for (int shift = 24; shift >= 0; shift -= 8) {
      for (int i = threadIdx.x; i < kBins; i += kTopkThreads) bins[i] = 0;
      __syncthreads();
      each_page([&](int page, uint32_t key) {
        if (is_candidate(page) && (shift == 24 || (key ^ threshold) >> (shift + 8) == 0))
          atomicAdd(&bins[key >> shift & (kBins - 1)], 1);
      });
      __syncthreads();
      if (warp == 0) {  // eight bins a lane, highest first
        int count[8], sum = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) sum += count[i] = bins[kBins - 1 - (lane * 8 + i)];
        int before = sum;
        for (int step = 1; step < kWarpSize; step *= 2) {
          const int other = __shfl_up_sync(kFullMask, before, step);
          if (lane >= step) before += other;
        }
        before -= sum;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (before < left && before + count[i] >= left)
            chosen_bin = kBins - 1 - (lane * 8 + i), left_in_bin = left - before;
          before += count[i];
        }
      }
      __syncthreads();
      threshold |= chosen_bin << shift;
      left = left_in_bin;
    }
  }

  const auto is_above = [&](int page, uint32_t key) {
    return page < n && (!is_candidate(page) || (left > 0 && key > threshold));
  };
  const auto is_equal = [&](int page, uint32_t key) { return is_candidate(page) && left > 0 && key == threshold; };
  int above = 0, equal = 0;
  each_page([&](int page, uint32_t key) {
    above += __popc(__ballot_sync(kFullMask, is_above(page, key)));
    equal += __popc(__ballot_sync(kFullMask, is_equal(page, key)));
  });
  if (lane == 0) warp_above[warp] = above, warp_equal[warp] = equal;
  __syncthreads();
  int above_before = lane < warp ? warp_above[lane] : 0, equal_before = lane < warp ? warp_equal[lane] : 0;
  above_before = __reduce_add_sync(kFullMask, above_before);
  equal_before = __reduce_add_sync(kFullMask, equal_before);

  int at = above_before + min(equal_before, left);
  const unsigned lower_lanes = (1u << lane) - 1;
  each_page([&](int page, uint32_t key) {
    const unsigned equals = __ballot_sync(kFullMask, is_equal(page, key));
    const bool taken =
        is_above(page, key) || (is_equal(page, key) && equal_before + __popc(equals & lower_lanes) < left);
    const unsigned all_taken = __ballot_sync(kFullMask, taken);
    if (taken) pages[at + __popc(all_taken & lower_lanes)] = page;
    at += __popc(all_taken);
    equal_before += __popc(equals);
  });
  start_next_kernel();
}

}  // namespace quest::cuda
