// topk_pages: a block owns a row. It reduces the scores to keys, which stay in shared memory as far as there is room,
// and selects (select.cuh).
#pragma once

#include "launch_order.cuh"
#include "select.cuh"

namespace quest::cuda {

constexpr int kTopkThreads = 1024;
static_assert(kTopkThreads == kWarpSize * kWarpSize);
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

// kept: keys that fit, a multiple of kLaneKeys, into the block's dynamic shared memory; those past them are reduced
// anew each time.
struct TopkLaunch {
  TopkParams params;
  int32_t kept;
};

__global__ void __launch_bounds__(kTopkThreads) topk_pages_kernel(const TopkLaunch launch) {
  extern __shared__ __align__(16) uint32_t kept_keys[];  // then the heads' [2, heads], for soft
  __shared__ SelectShared<kTopkThreads> shared;
  __shared__ float reduce_buffer[kTopkThreads / kWarpSize];

  wait_for_previous_kernel();
  const TopkParams& p = launch.params;
  const int row = blockIdx.x, h = row % p.Hs, t = row / p.Hs % p.size.T, b = row / p.Hs / p.size.T;
  int32_t* const pages = p.pages + int64_t{row} * p.K;
  const int n = p.paging.pages_of(p.paging.visible(b, t, p.size.T));
  if (n <= p.K) {
    for (int i = threadIdx.x; i < p.K; i += kTopkThreads) pages[i] = i < n ? i : -1;
    return;
  }

  const int heads = p.size.Hq / p.Hs, kept = launch.kept;
  float* const head_stats = reinterpret_cast<float*>(kept_keys + kept);
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
  const auto key = [&](int page) {
    return page >= p.sink_pages && page < n - p.recent_pages ? sort_key(reduced(page)) : kNoKey;
  };
  SeenKeys seen;
#pragma unroll 4
  for (int i = threadIdx.x; i < (n + kLaneKeys - 1) / kLaneKeys * kLaneKeys; i += kTopkThreads) {
    const uint32_t x = i < n ? key(i) : kNoKey;
    seen.see(x);
    if (i < kept) kept_keys[i] = x;
  }
  select_best<kTopkThreads>(
      n, p.K, p.sink_pages, p.recent_pages, seen, shared,
      [&](int i) {
        if (i < kept) return *reinterpret_cast<const uint4*>(kept_keys + i);
        const auto there = [&](int j) { return j < n ? key(j) : kNoKey; };
        return uint4{there(i), there(i + 1), there(i + 2), there(i + 3)};
      },
      [&](int place, int page) { pages[place] = page; });
  start_next_kernel();
}

}  // namespace quest::cuda
