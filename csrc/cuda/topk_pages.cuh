// topk_pages: a block owns a row. It reduces the scores to keys, which it keeps in shared memory, and selects
// (select.cuh).
//
// A row of more pages than that is cut into segments: a block finds the best of each, another the best of those.
#pragma once

#include "launch_order.cuh"
#include "select.cuh"
#include "softmax.cuh"

namespace quest::cuda {

constexpr int kTopkThreads = 512;
constexpr int kTopkFours = 4;  // of keys that a thread keeps
constexpr int kTopkKeys = kTopkThreads * kTopkFours * kLaneKeys;

template <class T, class Op>
__device__ __forceinline__ T topk_block_reduce(T x, T* shared, Op op) {
  for (int step = 1; step < kWarpSize; step *= 2) x = op(x, __shfl_xor_sync(kFullMask, x, step));
  __syncthreads();
  if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = x;
  __syncthreads();
  constexpr int kWarps = kTopkThreads / kWarpSize;
  x = shared[threadIdx.x % kWarps];
  for (int step = 1; step < kWarps; step *= 2) x = op(x, __shfl_xor_sync(kFullMask, x, step));
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

  // Of kCount pages at a time, so that their loads wait together.
  template <int kCount>
  __device__ __forceinline__ void reduce(const int (&pages)[kCount], float (&x)[kCount]) const {
#pragma unroll 4
    for (int h = 0; h < heads; ++h) {
      float y[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) y[i] = scores[h * stride + pages[i]];
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (how == GroupReduce::soft) y[i] = exp2f(y[i] * scale - top[h]) * share[h];
        x[i] = h == 0 ? y[i] : how == GroupReduce::max ? nan_max(x[i], y[i]) : x[i] + y[i];
      }
    }
  }
};

struct TopkLaunch {
  TopkParams params;
  int32_t segments;  // that a row is cut into, of kTopkKeys pages
  int32_t* best;     // [rows, segments, K], of several: the pages of each in order, and then -1
  uint32_t* keys;    // [rows, own_fours(P) * 4 * kTopkThreads], of one that is more than kTopkKeys pages
};

struct TopkRow {
  int b, t, h, heads, n, forced;
  const float* scores;  // of the first of its heads
  __device__ TopkRow(const TopkParams& p, int row) {
    h = row % p.Hs, t = row / p.Hs % p.size.T, b = row / p.Hs / p.size.T, heads = p.size.Hq / p.Hs;
    scores = p.scores + b * p.stride_b + t * p.stride_t + int64_t{h} * heads * p.stride_h;
  }
  // The scores of up to kTopkKeys pages from `first` on to the L2 cache, before it is known how many of them count.
  __device__ void fetch_scores(const TopkParams& p, int first) const {
    constexpr int kLine = 128 / sizeof(float);
    const int page = first + threadIdx.x * kLine;
    if (threadIdx.x * kLine >= kTopkKeys || page >= p.paging.P) return;
#pragma unroll 1
    for (int i = 0; i < heads; ++i) asm volatile("prefetch.global.L2 [%0];" ::"l"(scores + i * p.stride_h + page));
  }
  __device__ void read_length(const TopkParams& p) {
    n = p.paging.pages_of(p.paging.visible(b, t, p.size.T));
    forced = p.sink_pages + p.recent_pages;
  }
  __device__ bool is_cut(const TopkLaunch& launch) const {
    return launch.segments > 1 && n > kTopkKeys && n > launch.params.K && forced < launch.params.K;
  }
};

// Where four keys are in shared memory, in units of four: with a gap after each eight, so that threads which read their
// runs side by side meet in few banks.
__host__ __device__ __forceinline__ int four_place(int i) { return i + i / 8; }

// The best of `count` candidates of a row, of which page_of(i) tells the page, or -1. What shared memory does not hold
// of their keys goes to `far`. By all threads of the block.
template <class PageOf>
__device__ __forceinline__ void select_pages(
    const TopkParams& p, const TopkRow& row, int count, int forced, uint32_t* far, int32_t* pages, PageOf page_of) {
  extern __shared__ __align__(16) float memory[];  // [2, heads], for soft, and then the keys
  __shared__ SelectShared<kTopkThreads> shared;
  __shared__ float reduce_buffer[kTopkThreads / kWarpSize];
  const int heads = row.heads;
  ReducedScores reduced{row.scores, p.stride_h, heads, row.n, p.reduce, p.scale * kLog2e, memory, memory + heads};
  reduced.prepare(reduce_buffer);
  const int fours = own_fours<kTopkThreads>(count);
  const bool are_near = fours <= kTopkFours;
  uint32_t* const near = reinterpret_cast<uint32_t*>(memory) + (2 * heads + kLaneKeys - 1) / kLaneKeys * kLaneKeys;
  constexpr int kBatch = 2 * kLaneKeys;
#pragma unroll 1
  for (int first = 0; first < fours * kLaneKeys; first += kBatch) {
    // Of more than four keys each, neighbouring threads read neighbouring scores.
    const auto number = [&](int i) {
      return fours == 1 ? kLaneKeys * threadIdx.x + i : (first + i) * kTopkThreads + threadIdx.x;
    };
    int page[kBatch], safe[kBatch];
    float score[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      page[i] = number(i) < count ? page_of(number(i)) : -1;
      safe[i] = max(page[i], 0);
    }
    reduced.reduce(safe, score);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i >= fours * kLaneKeys) break;
      const bool candidate = page[i] >= p.sink_pages && page[i] < row.n - p.recent_pages;
      const uint32_t key = page[i] < 0 ? kNoKey : candidate ? sort_key(score[i]) : kForcedKey;
      const int at = number(i);
      if (are_near)
        near[four_place(at / kLaneKeys) * kLaneKeys + at % kLaneKeys] = key;
      else
        far[at] = key;
    }
  }
  if (fours > 1) __syncthreads();
  const auto load = [&](int j) {
    const int four = fours * threadIdx.x + j;
    return are_near ? reinterpret_cast<const uint4*>(near)[four_place(four)]
                    : reinterpret_cast<const uint4*>(far)[four];
  };
  SeenKeys seen;
#pragma unroll 1
  for (int j = 0; j < fours; ++j) seen.see(load(j));
  select_best<kTopkThreads>(
      count, p.K, forced, seen, shared, load, [&](int place, int i) { pages[place] = page_of(i); });
}

// A block a segment, and kAtOnce of them on a multiprocessor: one has more registers where there are few.
template <int kAtOnce>
__global__ void __launch_bounds__(kTopkThreads, kAtOnce) topk_pages_kernel(const TopkLaunch launch) {
  const TopkParams& p = launch.params;
  const int index = blockIdx.x / launch.segments, segment = blockIdx.x % launch.segments;
  TopkRow row(p, index);
  wait_for_previous_kernel();
  row.fetch_scores(p, segment * kTopkKeys);
  row.read_length(p);
  int first = 0, count = row.n, forced = row.forced;
  int32_t* pages = p.pages + int64_t{index} * p.K;
  if (row.is_cut(launch)) {
    first = segment * kTopkKeys, count = max(0, min(kTopkKeys, row.n - first));
    forced = max(0, min(p.sink_pages - first, count)) + max(0, min(first + count - row.n + p.recent_pages, count));
    pages = launch.best + int64_t{blockIdx.x} * p.K;
  } else if (segment > 0) {
    return;
  }
  if (count > p.K && forced < p.K) {
    uint32_t* const far = launch.keys + int64_t{index} * own_fours<kTopkThreads>(p.paging.P) * kLaneKeys * kTopkThreads;
    select_pages(p, row, count, forced, far, pages, [=](int i) { return first + i; });
  } else {
    for (int i = threadIdx.x; i < p.K; i += kTopkThreads)
      pages[i] = count <= p.K ? (i < count ? first + i : -1) : i < p.sink_pages ? i : row.n - p.K + i;
  }
}

// A block a row that was cut into segments.
__global__ void __launch_bounds__(kTopkThreads, 2) topk_best_kernel(const TopkLaunch launch) {
  const TopkParams& p = launch.params;
  TopkRow row(p, blockIdx.x);
  wait_for_previous_kernel();
  row.read_length(p);
  if (!row.is_cut(launch)) return;
  const int32_t* const best = launch.best + int64_t{blockIdx.x} * launch.segments * p.K;
  select_pages(p, row, launch.segments * p.K, row.forced, nullptr, p.pages + int64_t{blockIdx.x} * p.K, [=](int i) {
    return best[i];
  });
}

}  // namespace quest::cuda
