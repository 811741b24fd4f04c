// topk_pages: a block owns a row. It reduces the scores of a group to keys in shared memory and selects the best
// (radix_select.cuh).
//
// A row of more pages than shared memory holds is split: a block selects the best of each split, another the best of
// those.
#pragma once

#include "core/ptx.cuh"
#include "tile/radix_select.cuh"
#include "tile/softmax_state.cuh"

namespace quest::cuda {

constexpr int kTopkThreads = 512;
constexpr int kTopkVecs = 4;  // vectors of keys that shared memory holds for each thread
constexpr int kTopkKeys = kTopkThreads * kTopkVecs * kVecKeys;

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
  float scale;         // to units of log2(e)
  float* max;          // [heads], soft: the largest scaled score of each head
  float* inverse_sum;  // [heads], soft: one over the sum of its weights

  __device__ void prepare(float* shared) {
    if (how != GroupReduce::soft) return;
    for (int h = 0; h < heads; ++h) {
      float m = -INFINITY, sum = 0.f;
      for (int i = threadIdx.x; i < n; i += kTopkThreads) m = nan_max(m, scores[h * stride + i] * scale);
      m = topk_block_reduce(m, shared, [](float a, float b) { return nan_max(a, b); });
      for (int i = threadIdx.x; i < n; i += kTopkThreads) sum += exp2f(scores[h * stride + i] * scale - m);
      sum = topk_block_reduce(sum, shared, [](float a, float b) { return a + b; });
      if (threadIdx.x == 0) max[h] = m, inverse_sum[h] = 1.f / sum;
    }
    __syncthreads();
  }

  // For kCount pages at a time, so that their loads wait together.
  template <int kCount>
  __device__ __forceinline__ void reduce(const int (&pages)[kCount], float (&x)[kCount]) const {
#pragma unroll 4
    for (int h = 0; h < heads; ++h) {
      float y[kCount];
#pragma unroll
      for (int i = 0; i < kCount; ++i) y[i] = scores[h * stride + pages[i]];
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (how == GroupReduce::soft) y[i] = exp2f(y[i] * scale - max[h]) * inverse_sum[h];
        x[i] = h == 0 ? y[i] : how == GroupReduce::max ? nan_max(x[i], y[i]) : x[i] + y[i];
      }
    }
  }
};

struct TopkKernelParams {
  TopkParams op;
  int32_t splits;       // of a row, kTopkKeys pages each
  int32_t* split_best;  // [rows, splits, K] where a row has several: the pages of each split, ascending, -1 padded
  uint32_t* keys;       // [rows, vecs_per_thread(P) * 4 * kTopkThreads] where one split has more than kTopkKeys pages
};

struct TopkRow {
  int b, t, h, heads, n, K, forced;
  const float* scores;  // of the first of its heads
  __device__ TopkRow(const TopkParams& p, int row) {
    h = row % p.Hs, t = row / p.Hs % p.size.T, b = row / p.Hs / p.size.T, heads = p.size.Hq / p.Hs;
    scores = p.scores + b * p.stride_b + t * p.stride_t + int64_t{h} * heads * p.stride_h;
  }
  // Prefetches the scores of up to kTopkKeys pages from `first` on, before the length is known.
  __device__ void fetch_scores(const TopkParams& p, int first) const {
    constexpr int kLine = 128 / sizeof(float);
    const int page = first + threadIdx.x * kLine;
    if (threadIdx.x * kLine >= kTopkKeys || page >= p.paging.P) return;
#pragma unroll 1
    for (int i = 0; i < heads; ++i) prefetch_l2(scores + i * p.stride_h + page);
  }
  __device__ void read_length(const TopkParams& p) {
    n = p.paging.pages_of(p.paging.visible(b, t, p.size.T));
    K = pages_to_select(p, b, p.paging.length(b));
    forced = p.sink_pages + p.recent_pages;
  }
  __device__ bool is_split(const TopkKernelParams& params) const {
    return params.splits > 1 && n > kTopkKeys && n > K && forced < K;
  }
};

// The place of a vector of keys in shared memory: a gap after each eight keeps threads that read at a stride from
// meeting in one bank.
__host__ __device__ __forceinline__ int padded(int i) { return i + i / 8; }

// The best of `count` candidates of a row; page_of(i) is the page of one, or -1. Keys that shared memory does not hold
// go to `global_keys`. By all threads of the block.
template <class PageOf>
__device__ __forceinline__ void select_pages(
    const TopkParams& p, const TopkRow& row, int count, int forced, uint32_t* global_keys, int32_t* pages,
    PageOf page_of) {
  extern __shared__ __align__(16) float memory[];  // [2, heads], for soft, and then the keys
  __shared__ SelectShared<kTopkThreads> shared;
  __shared__ float reduce_buffer[kTopkThreads / kWarpSize];
  const int heads = row.heads;
  ReducedScores reduced{row.scores, p.stride_h, heads, row.n, p.reduce, p.scale * kLog2e, memory, memory + heads};
  reduced.prepare(reduce_buffer);
  const int vecs = vecs_per_thread<kTopkThreads>(count);
  const bool in_shared = vecs <= kTopkVecs;
  uint32_t* const shared_keys = reinterpret_cast<uint32_t*>(memory) + (2 * heads + kVecKeys - 1) / kVecKeys * kVecKeys;
  constexpr int kBatch = 2 * kVecKeys;
#pragma unroll 1
  for (int first = 0; first < vecs * kVecKeys; first += kBatch) {
    // Where a thread has several vectors, neighbouring threads read neighbouring scores.
    const auto index = [&](int i) {
      return vecs == 1 ? kVecKeys * threadIdx.x + i : (first + i) * kTopkThreads + threadIdx.x;
    };
    int page[kBatch], safe[kBatch];
    float score[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      page[i] = index(i) < count ? page_of(index(i)) : -1;
      safe[i] = max(page[i], 0);
    }
    reduced.reduce(safe, score);
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i >= vecs * kVecKeys) break;
      const bool candidate = page[i] >= p.sink_pages && page[i] < row.n - p.recent_pages;
      const uint32_t key = page[i] < 0 ? kNoKey : candidate ? sort_key(score[i]) : kForcedKey;
      const int at = index(i);
      if (in_shared)
        shared_keys[padded(at / kVecKeys) * kVecKeys + at % kVecKeys] = key;
      else
        global_keys[at] = key;
    }
  }
  if (vecs > 1) __syncthreads();
  const auto load = [&](int j) {
    const int vec = vecs * threadIdx.x + j;
    return in_shared ? reinterpret_cast<const uint4*>(shared_keys)[padded(vec)]
                     : reinterpret_cast<const uint4*>(global_keys)[vec];
  };
  KeyRange own;
#pragma unroll 1
  for (int j = 0; j < vecs; ++j) own.add(load(j));
  select_best<kTopkThreads>(
      count, row.K, forced, own, shared, load, [&](int place, int i) { pages[place] = page_of(i); });
  if (row.K < p.K) [[unlikely]]
#pragma unroll 1
    for (int i = row.K + threadIdx.x; i < p.K; i += kTopkThreads) pages[i] = -1;
}

// A block owns a split. kResident blocks share a multiprocessor: where there are few, one block gets more registers.
// kRagged: new_lens, budgets or dense_below are given. A kernel that never looks for them is 0.08 us faster.
template <int kResident, bool kRagged>
__global__ void __launch_bounds__(kTopkThreads, kResident) topk_pages_kernel(const TopkKernelParams params) {
  TopkParams p = params.op;
  if constexpr (!kRagged) p.paging.new_lens = nullptr, p.budgets = nullptr, p.dense_below = 0, p.num_pages = p.K;
  const int index = blockIdx.x / params.splits, split = blockIdx.x % params.splits;
  TopkRow row(p, index);
  wait_for_previous_kernel();
  row.fetch_scores(p, split * kTopkKeys);
  row.read_length(p);
  int first = 0, count = row.n, forced = row.forced;
  int32_t* pages = p.pages + int64_t{index} * p.K;
  if (row.is_split(params)) {
    first = split * kTopkKeys, count = max(0, min(kTopkKeys, row.n - first));
    forced = max(0, min(p.sink_pages - first, count)) + max(0, min(first + count - row.n + p.recent_pages, count));
    pages = params.split_best + int64_t{blockIdx.x} * p.K;
  } else if (split > 0) {
    return;
  }
  if (count > row.K && forced < row.K) {
    uint32_t* const global_keys =
        params.keys + int64_t{index} * vecs_per_thread<kTopkThreads>(p.paging.P) * kVecKeys * kTopkThreads;
    select_pages(p, row, count, forced, global_keys, pages, [=](int i) { return first + i; });
  } else {
    const int listed = min(count, row.K), from_start = count <= row.K ? count : p.sink_pages;
    for (int i = threadIdx.x; i < p.K; i += kTopkThreads)
      pages[i] = i >= listed ? -1 : i < from_start ? first + i : row.n - row.K + i;
  }
}

// A block owns a row that has several splits.
__global__ void __launch_bounds__(kTopkThreads, 2) topk_best_kernel(const TopkKernelParams params) {
  const TopkParams& p = params.op;
  TopkRow row(p, blockIdx.x);
  wait_for_previous_kernel();
  row.read_length(p);
  if (!row.is_split(params)) return;
  const int32_t* const best = params.split_best + int64_t{blockIdx.x} * params.splits * p.K;
  select_pages(p, row, params.splits * p.K, row.forced, nullptr, p.pages + int64_t{blockIdx.x} * p.K, [=](int i) {
    return best[i];
  });
}

}  // namespace quest::cuda
