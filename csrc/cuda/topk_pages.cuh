// topk_pages: a block owns a row. The keys of the reduced scores are made once, into shared memory; rows that do not fit
// there reduce the scores anew whenever a key is asked for.
#pragma once

#include "launch_order.cuh"
#include "select.cuh"

namespace quest::cuda {

constexpr float kLog2e = 1.4426950408889634f;

template <int kThreads, class T, class Op>
__device__ __forceinline__ T topk_block_reduce(T x, T* shared, Op op) {
  for (int step = 1; step < kWarpSize; step *= 2) x = op(x, __shfl_xor_sync(kFullMask, x, step));
  __syncthreads();
  if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = x;
  __syncthreads();
  x = shared[threadIdx.x % (kThreads / kWarpSize)];
  for (int step = 1; step < kThreads / kWarpSize; step *= 2) x = op(x, __shfl_xor_sync(kFullMask, x, step));
  return x;
}

constexpr int kHeadsAtOnce = 4;

// The scores of one row, reduced over the heads that share its list.
struct ReducedScores {
  const float* scores;  // of the first head
  int64_t stride;       // to the next head
  int heads, n;
  GroupReduce how;
  float scale;   // to units of log2(e)
  float* top;    // [heads], soft: the largest scaled score of each head
  float* share;  // [heads], soft: one over the sum of its weights

  template <int kThreads>
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
    float x = how == GroupReduce::max ? -INFINITY : 0.f;
    for (int first = 0; first < heads; first += kHeadsAtOnce) {
      float y[kHeadsAtOnce];  // asked for together
#pragma unroll
      for (int i = 0; i < kHeadsAtOnce; ++i) y[i] = first + i < heads ? scores[(first + i) * stride + page] : 0.f;
#pragma unroll
      for (int i = 0; i < kHeadsAtOnce; ++i) {
        if (first + i >= heads) break;
        if (how == GroupReduce::max)
          x = nan_max(x, y[i]);
        else if (how == GroupReduce::soft)
          x += exp2f(y[i] * scale - top[first + i]) * share[first + i];
        else
          x = first + i == 0 ? y[i] : x + y[i];
      }
    }
    return x;
  }
};

// Where the keys begin behind the statistics of the heads, in words: at a multiple of 16 bytes.
__host__ __device__ constexpr int key_offset(int heads) { return (2 * heads + 3) / 4 * 4; }

template <int kThreads, bool kKeepKeys>
__global__ void __launch_bounds__(kThreads) topk_pages_kernel(const TopkParams p) {
  extern __shared__ __align__(16) float head_stats[];  // [2, heads], and the keys [P] behind them
  __shared__ SelectShared<kThreads> shared;

  wait_for_previous_kernel();
  const int row = blockIdx.x, h = row % p.Hs, t = row / p.Hs % p.size.T, b = row / p.Hs / p.size.T;
  int32_t* const pages = p.pages + int64_t{row} * p.K;
  const int n = p.paging.pages_of(p.paging.visible(b, t, p.size.T));
  if (n <= p.K) {
    for (int i = threadIdx.x; i < p.K; i += kThreads) pages[i] = i < n ? i : -1;
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
  reduced.template prepare<kThreads>(reinterpret_cast<float*>(shared.few));

  uint32_t* const keys = reinterpret_cast<uint32_t*>(head_stats) + key_offset(heads);
  const auto is_candidate = [&](int i) { return i >= p.sink_pages && i < n - p.recent_pages; };
  if constexpr (kKeepKeys) {
#pragma unroll 2
    for (int i = threadIdx.x; i < (n + kStretch - 1) / kStretch * kStretch; i += kThreads)
      keys[i] = is_candidate(i) ? sort_key(reduced(i)) : kNoKey;
    __syncthreads();
  }
  constexpr int kLaneKeys = lane_keys(kThreads);
  const auto load = [&](int i, uint32_t(&to)[kLaneKeys]) {
    if constexpr (kKeepKeys) {
      load_keys(keys + i, to);
    } else {
#pragma unroll
      for (int j = 0; j < kLaneKeys; ++j) to[j] = is_candidate(i + j) ? sort_key(reduced(i + j)) : kNoKey;
    }
  };
  select_best<kThreads>(
      n, p.K, p.sink_pages, p.recent_pages, shared, load, [&](int place, int page) { pages[place] = page; });
  start_next_kernel();
}

}  // namespace quest::cuda
