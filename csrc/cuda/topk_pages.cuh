// topk_pages: a block owns a row. It reduces the scores to keys, which stay in shared memory as far as there is room,
// and selects (select.cuh).
#pragma once

#include "launch_order.cuh"
#include "select.cuh"
#include "softmax.cuh"

namespace quest::cuda {

// Of a block: few where they have four keys each at most.
constexpr int kTopkThreads = 1024, kFewTopkThreads = 512;

template <int kThreads, class T, class Op>
__device__ __forceinline__ T topk_block_reduce(T x, T* shared, Op op) {
  for (int step = 1; step < kWarpSize; step *= 2) x = op(x, __shfl_xor_sync(kFullMask, x, step));
  __syncthreads();
  if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = x;
  __syncthreads();
  constexpr int kWarps = kThreads / kWarpSize;
  x = shared[threadIdx.x % kWarps];
  for (int step = 1; step < kWarps; step *= 2) x = op(x, __shfl_xor_sync(kFullMask, x, step));
  return x;
}

// The scores of one row, reduced over the heads that share its list.
template <int kThreads>
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
      for (int i = threadIdx.x; i < n; i += kThreads) m = nan_max(m, scores[h * stride + i] * scale);
      m = topk_block_reduce<kThreads>(m, shared, [](float a, float b) { return nan_max(a, b); });
      for (int i = threadIdx.x; i < n; i += kThreads) sum += exp2f(scores[h * stride + i] * scale - m);
      sum = topk_block_reduce<kThreads>(sum, shared, [](float a, float b) { return a + b; });
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

// kept: so many times four keys stay in the block's dynamic shared memory; those past them are reduced anew each time.
struct TopkLaunch {
  TopkParams params;
  int32_t kept;
};

template <int kThreads>
__global__ void __launch_bounds__(kThreads) topk_pages_kernel(const TopkLaunch launch) {
  extern __shared__ __align__(16) uint32_t kept_keys[];  // and the heads' [2, heads], for soft
  __shared__ SelectShared<kThreads> shared;
  __shared__ float reduce_buffer[kThreads / kWarpSize];

  wait_for_previous_kernel();
  const TopkParams& p = launch.params;
  const int row = blockIdx.x, h = row % p.Hs, t = row / p.Hs % p.size.T, b = row / p.Hs / p.size.T;
  int32_t* const pages = p.pages + int64_t{row} * p.K;
  const int n = p.paging.pages_of(p.paging.visible(b, t, p.size.T));
  const int forced = p.sink_pages + p.recent_pages;
  if (n <= p.K || forced == p.K) {
    for (int i = threadIdx.x; i < p.K; i += kThreads)
      pages[i] = n <= p.K ? (i < n ? i : -1) : i < p.sink_pages ? i : n - p.K + i;
    return;
  }

  const int heads = p.size.Hq / p.Hs;
  const int kept = launch.kept;
  float* const head_stats = reinterpret_cast<float*>(kept_keys + four_place(kept) * kLaneKeys);
  ReducedScores<kThreads> reduced{
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
    if (page >= n) return kNoKey;
    return page >= p.sink_pages && page < n - p.recent_pages ? sort_key(reduced(page)) : kForcedKey;
  };
  const int fours = own_fours<kThreads>(n);
  SeenKeys seen;
#pragma unroll 4
  for (int i = 0; i < fours * kLaneKeys; ++i) {
    const int page = fours == 1 ? kLaneKeys * threadIdx.x + i : i * kThreads + threadIdx.x;
    const uint32_t x = key(page);
    seen.see(x);
    if (page / kLaneKeys < kept) kept_keys[four_place(page / kLaneKeys) * kLaneKeys + page % kLaneKeys] = x;
  }
  select_best<kThreads>(
      n, p.K, forced, seen, shared,
      [&](int j) {
        const int i = fours * threadIdx.x + j, page = i * kLaneKeys;
        if (i < kept) return reinterpret_cast<const uint4*>(kept_keys)[four_place(i)];
        return uint4{key(page), key(page + 1), key(page + 2), key(page + 3)};
      },
      [&](int place, int page) { pages[place] = page; });
  start_next_kernel();
}

}  // namespace quest::cuda
