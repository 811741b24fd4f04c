// decode_step: append, estimate, selection and attention of one new token by one launch, a cluster of blocks for each
// sequence and KV head.
//
// The blocks of a cluster share out the pages to score, 128 at a time, and send the keys of the scores to the first
// block's shared memory; that block selects and sends each block its part of the list; each attends to so many chunks
// of it and sends what it found back; the first block folds. Nothing but the result, the list and the new token goes to
// device memory. The parts are those of estimate, topk_pages and sparse_decode, and so are the bits.
#pragma once

#include <cooperative_groups.h>
#include <cuda_pipeline.h>

#include "append_kv.cuh"
#include "attend_chunk.cuh"
#include "bounds_tile.cuh"
#include "launch_order.cuh"
#include "select.cuh"

namespace quest::cuda {

constexpr int kStepThreads = 256;
constexpr int kStepWarps = kStepThreads / kWarpSize;

// Where things are in a block's dynamic shared memory, in bytes. All but list and warp_out is the first block's. The
// keys and the table are done with when the first warp result is written.
struct StepMemory {
  int list;      // [entries] ListedPage: this block's part of the list
  int chosen;    // [K] logical pages
  int keys;      // [P]
  int table;     // [P]: the sequence's row of the page table; -1: it does not fit, and is read where it is
  int warp_out;  // [kStepWarps, G, D]; then, in combining, what the parts weigh
  int parts;     // [parts, G, D], then their maxima and sums [parts, G]
  int bytes;
};

// fold: x becomes keep * x + add * next.
struct FoldWeights {
  float keep, add;
};

struct StepParams {
  AppendParams append;  // paging.seq_lens: tokens before the step
  Sizes size;
  Paging paging;  // seq_lens: tokens with the new one
  Query q;
  int32_t K, sink_pages, recent_pages;
  GroupReduce reduce;
  float scale;
  int32_t* pages;       // [B, Hkv, K] contiguous
  void* out;            // [B, Hq, D] contiguous
  float* lse;           // [B, Hq]
  int32_t part_chunks;  // chunks of the list that a block attends to: below kSpanChunks, or a multiple of it
  StepMemory memory;
};

struct ListedPage {
  int physical;  // or kBrokenPage
  int tokens;    // that are in it
};

// The scores of a tile, reduced over the heads of the group in the order of topk_pages. Lanes c = 0, 1 of each four
// have those of pages r and r + 8.
__device__ __forceinline__ float reduce_group(const float (&scores)[4], int group, GroupReduce how) {
  const int lane = threadIdx.x % kWarpSize, c = lane % 4;
  float reduced[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (how == GroupReduce::sum) {
      float x = __shfl_sync(kFullMask, scores[2 * half], lane - c);
#pragma unroll
      for (int h = 1; h < kMmaHeads; ++h) {
        const float y = __shfl_sync(kFullMask, scores[2 * half + h % 2], lane - c + h / 2);
        if (h < group) x += y;
      }
      reduced[half] = x;
    } else {
      float x = 2 * c < group ? scores[2 * half] : -INFINITY;
      if (2 * c + 1 < group) x = nan_max(x, scores[2 * half + 1]);
      x = nan_max(x, __shfl_xor_sync(kFullMask, x, 1));
      reduced[half] = nan_max(x, __shfl_xor_sync(kFullMask, x, 2));
    }
  }
  return reduced[c & 1];
}

#if __CUDA_ARCH__ >= 900 || !defined(__CUDA_ARCH__)

template <class T, class Bound, int D>
struct StepBlock {
  using Attend = MmaAttend<T, D>;
  using Merge = ChunkMerge<Attend>;
  static_assert(Attend::kThreads == kStepThreads);

  union Shared {
    typename PageBounds<T, kStepThreads>::Shared append;
    SelectShared<kStepThreads> select;
    WarpResults<kStepWarps> results;
  };

  const StepParams& p;
  Shared& shared;
  std::byte* const memory;
  const cooperative_groups::cluster_group cluster = cooperative_groups::this_cluster();
  const int rank = cluster.block_rank(), blocks = cluster.num_blocks();
  const int row = blockIdx.x / blocks, head = row % p.size.Hkv, b = row / p.size.Hkv;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int group = p.size.group();
  const int entries = p.part_chunks * kChunkTokens >> p.paging.page_shift;  // of the list, for a block
  const QueryTile<T> query{
      static_cast<const T*>(p.q.data) + b * p.q.stride_b + head * group * p.q.stride_h, p.q.stride_h, group, head};

  template <class X>
  __device__ X* at(int offset) const {
    return reinterpret_cast<X*>(memory + offset);
  }
  template <class X>
  __device__ X* of_block(int block, int offset) const {
    return cluster.map_shared_rank(at<X>(offset), block);
  }

  // The new token's key and value by the last block, whose first block is busy enough.
  struct NewToken {
    int physical = -1, slot;
    uint4 x;
  };
  __device__ int last_block() const { return blocks - 1; }

  __device__ NewToken load_new_token(int start) const {
    NewToken token;
    if (rank != last_block()) return token;
    token.physical = p.paging.physical(b, start >> p.paging.page_shift);
    token.slot = start & (p.paging.page_size() - 1);
    constexpr int kVecs = D * sizeof(T) / 16;
    const NewTokens& from = threadIdx.x < kVecs ? p.append.k : p.append.v;
    const T* const row = static_cast<const T*>(from.data) + b * from.stride_b + head * from.stride_h;
    token.x = load_once(row + threadIdx.x % kVecs * 8, threadIdx.x < 2 * kVecs);
    return token;
  }

  __device__ void store_new_token(const NewToken& token) const {
    if (token.physical < 0) return;
    // The page's keys will be wanted for its bounds.
    const T* const key = token_row<T>(p.append.k_cache, token.physical, head, threadIdx.x);
    if (threadIdx.x < token.slot) prefetch_row(key, D * sizeof(T));
    constexpr int kVecs = D * sizeof(T) / 16;
    if (threadIdx.x >= 2 * kVecs) return;
    const Cache& to = threadIdx.x < kVecs ? p.append.k_cache : p.append.v_cache;
    T* const row =
        static_cast<T*>(to.data) + token.physical * to.stride_n + head * to.stride_h + token.slot * to.stride_s;
    *reinterpret_cast<uint4*>(row + threadIdx.x % kVecs * 8) = token.x;
  }

  __device__ void renew_bounds(const NewToken& token) {
    if (token.physical < 0) return;
    renew_page_bounds<T, kStepThreads>(
        p.append.k_cache, p.append.k_bounds, D, token.physical, head, token.slot + 1, shared.append);
  }

  // A lane's page of a tile of sixteen: its physical page.
  __device__ int find_page(int tile) const { return p.paging.physical(b, tile * kMmaRows + lane % kMmaRows); }

  // The keys of this block's pages of n, to the first block. page, next: find_page of the warp's first two tiles.
  __device__ void estimate(int n, int page, int next) {
    const Bounds& bounds = p.append.k_bounds;
    uint32_t* const keys = of_block<uint32_t>(0, p.memory.keys);
    const int r = lane / 4, c = lane % 4, stride = blocks * kStepWarps;
    const int first = rank * kStepWarps + warp, tiles = (n + kMmaRows - 1) / kMmaRows;
    const auto prefetch = [&](int tile, int page) {
      if (page < 0 || tile * kMmaRows + lane % kMmaRows >= n) return;
      const Bound* const lower =
          static_cast<const Bound*>(bounds.data) + page * bounds.stride_n + head * bounds.stride_h;
      prefetch_row(lane < kMmaRows ? lower : lower + bounds.stride_c, D * sizeof(Bound));
    };
    SplitQuery<T, Bound, D> split;
    split.load(r < group ? query.data + r * query.stride : nullptr);
    prefetch(first + stride, next);
    for (int tile = first; tile < tiles; tile += stride) {
      BoundsTile<T, Bound, D> rows;
      bool broken[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int physical = __shfl_sync(kFullMask, page, r + half * 8);
        const bool there = tile * kMmaRows + r + half * 8 < n;
        broken[half] = physical < 0;
        rows.load(half, bounds, there ? physical : -1, head);
      }
      page = next, next = find_page(tile + 2 * stride);
      float scores[4];
      rows.score(scores, split);
      const float score = reduce_group(scores, group, p.reduce);
      const int mine = tile * kMmaRows + r + c * 8;
      const bool candidate = mine >= p.sink_pages && mine < n - p.recent_pages;
      if (c < 2 && mine < n) keys[mine] = candidate ? sort_key(broken[c & 1] ? NAN : score) : kNoKey;
      prefetch(tile + 2 * stride, next);
    }
  }

  __device__ ListedPage listed(int page, int physical, int length) const {
    return {physical < 0 ? kBrokenPage : physical, min(p.paging.page_size(), length - (page << p.paging.page_shift))};
  }

  // By the first block, before it scores: the page table, so that the selection need not wait for it.
  __device__ void prepare_selection(int n) const {
    const int32_t* const from = p.paging.page_table + b * p.paging.page_table_stride;
    for (int i = threadIdx.x; p.memory.table >= 0 && i < n; i += kStepThreads)
      __pipeline_memcpy_async(at<int>(p.memory.table) + i, from + i, sizeof(int));
    __pipeline_commit();
  }

  // By the first block: the best pages, to the blocks that read them.
  __device__ void select(int n, int length) {
    const uint32_t* const keys = at<uint32_t>(p.memory.keys);
    int* const chosen = at<int>(p.memory.chosen);
    __pipeline_wait_prior(0);
    select_best<kStepThreads>(
        n, p.K, p.sink_pages, p.recent_pages, shared.select, [&](int i) { return keys[i]; },
        [&](int place, int page) { chosen[place] = page; });
    __syncthreads();
    for (int i = threadIdx.x; i < p.K; i += kStepThreads) {
      const int page = chosen[i];
      int physical = p.memory.table < 0 ? p.paging.physical(b, page) : at<int>(p.memory.table)[page];
      if (physical >= p.paging.N) physical = -1;
      p.pages[int64_t{row} * p.K + i] = page;
      of_block<ListedPage>(i / entries, p.memory.list)[i % entries] = listed(page, physical, length);
    }
  }

  // Where the list has room for every page: by each block, its own part.
  __device__ void list_all(int n, int length) {
    for (int i = threadIdx.x; i < entries; i += kStepThreads) {
      const int page = rank * entries + i;
      if (page < p.K) p.pages[int64_t{row} * p.K + page] = page < n ? page : -1;
      if (page < n) at<ListedPage>(p.memory.list)[i] = listed(page, p.paging.physical(b, page), length);
    }
  }

  __device__ float* part_out(std::byte* base, int part) const {
    return reinterpret_cast<float*>(base + p.memory.parts) + part * group * D;
  }
  __device__ int num_parts() const {
    const int chunks = blocks * p.part_chunks;
    return p.part_chunks < kSpanChunks ? chunks : chunks / kSpanChunks;
  }
  __device__ float* part_scalars(std::byte* base, int part) const {
    return part_out(base, num_parts()) + part * group * 2;
  }

  __device__ void send(int part, const typename Merge::Chunk& result) const {
    std::byte* const first_block = of_block<std::byte>(0, 0);
    const int h = Merge::head();
#pragma unroll
    for (int i = 0; i < Merge::kColumns; ++i) {
      const int column = Merge::first_column() + i * Merge::kHeadThreads;
      if (column * 4 < D) reinterpret_cast<float4*>(part_out(first_block, part) + h * D)[column] = result.out[i];
    }
    if (Merge::first_column() == 0)
      *reinterpret_cast<float2*>(part_scalars(first_block, part) + h * 2) = {result.top, result.sum};
  }

  // This block's part of the list of `count` pages, to the first block.
  __device__ void attend(int count) {
    const Softmax softmax(p.scale);
    const Cache &k = p.append.k_cache, &v = p.append.v_cache;
    const ListedPage* const list = at<ListedPage>(p.memory.list);
    float* const warp_out = at<float>(p.memory.warp_out);
    const int listed = min(count - rank * entries, entries), tokens = listed << p.paging.page_shift;
    const int page_size = p.paging.page_size(), warp_token = warp * Attend::kTokens;
    const auto find = [&](int offset) {
      const int i = warp_token + offset + lane % Attend::kTokens, entry = i >> p.paging.page_shift;
      if (entry >= listed) return kNoToken;
      const ListedPage page = list[entry];
      return (i & (page_size - 1)) < page.tokens ? page.physical : kNoToken;
    };
    if (tokens <= 0) return;
    const bool spans = p.part_chunks >= kSpanChunks;
    typename Merge::Chunk partial;
    typename Attend::Shared none;
    Attend warp_tokens(query, D, none);
    warp_tokens.load(k, v, query, find(0), warp_token, page_size);
    Attend::prefetch(k, v, query, find(kChunkTokens), warp_token + kChunkTokens, page_size);
    for (int offset = 0; offset < tokens; offset += kChunkTokens) {
      __syncthreads();
      warp_tokens.attend(
          softmax, k, v, query, warp_out + warp * group * D, shared.results.max[warp], shared.results.sum[warp], none);
      const int next = offset + kChunkTokens;
      if (next < tokens) {
        warp_tokens.load(k, v, query, find(next), warp_token + next, page_size);
        Attend::prefetch(k, v, query, find(next + kChunkTokens), warp_token + next + kChunkTokens, page_size);
      }
      __syncthreads();
      if (Merge::head() >= group) continue;
      const int chunk = rank * p.part_chunks + offset / kChunkTokens;
      const auto merged = Merge::merge(softmax, shared.results, warp_out, group, D);
      if (!spans) {
        send(chunk, merged);
        continue;
      }
      partial.fold(merged, softmax);
      if (chunk % kSpanChunks == kSpanChunks - 1 || next >= tokens) {
        send(chunk / kSpanChunks, partial);
        partial = {};
      }
    }
  }

  // The fold of all parts, as decode_combine_kernel does it: its weights first, by a thread a head and span.
  __device__ void combine(int count) {
    const Softmax softmax(p.scale);
    const int in_span = p.part_chunks < kSpanChunks ? kSpanChunks : 1;
    const int part_tokens = kChunkTokens * kSpanChunks / in_span;
    const int parts = ((count << p.paging.page_shift) + part_tokens - 1) / part_tokens;
    const int spans = (parts + in_span - 1) / in_span;
    FoldWeights* const weights = at<FoldWeights>(p.memory.warp_out);  // [parts, G], then of all spans [spans, G]
    FoldWeights* const span_weights = weights + parts * group;
    float2* const span_scalars = reinterpret_cast<float2*>(span_weights + spans * group);  // maximum, sum
    float2* const totals = span_scalars + spans * group;
    const auto fold = [&](float2& x, float2 next) {
      const float both = fmaxf(x.x, next.x);
      const FoldWeights w{softmax.weight(x.x, both), softmax.weight(next.x, both)};
      x = {both, __fmaf_rn(w.keep, x.y, __fmul_rn(w.add, next.y))};
      return w;
    };
    if (threadIdx.x < group * spans) {
      const int h = threadIdx.x % group, span = threadIdx.x / group;
      float2 total{-INFINITY, 0.f};
#pragma unroll 2
      for (int part = span * in_span; part < min((span + 1) * in_span, parts); ++part)
        weights[part * group + h] = fold(total, *reinterpret_cast<const float2*>(part_scalars(memory, part) + h * 2));
      span_scalars[span * group + h] = total;
    }
    __syncthreads();
    if (threadIdx.x < group) {
      const int h = threadIdx.x;
      float2 total{-INFINITY, 0.f};
#pragma unroll 1
      for (int span = 0; span < spans; ++span)
        span_weights[span * group + h] = fold(total, span_scalars[span * group + h]);
      totals[h] = total;
    }
    __syncthreads();
    constexpr int kColumns = D / 4;
#pragma unroll 1
    for (int i = threadIdx.x; i < group * kColumns; i += kStepThreads) {
      const int h = i / kColumns, column = i % kColumns;
      const auto mix = [](float4& x, FoldWeights w, float4 y) {
        x.x = __fmaf_rn(w.keep, x.x, __fmul_rn(w.add, y.x)), x.y = __fmaf_rn(w.keep, x.y, __fmul_rn(w.add, y.y));
        x.z = __fmaf_rn(w.keep, x.z, __fmul_rn(w.add, y.z)), x.w = __fmaf_rn(w.keep, x.w, __fmul_rn(w.add, y.w));
      };
      Partial<1> total;
#pragma unroll 1
      for (int span = 0; span < spans; ++span) {
        float4 sum{};
#pragma unroll 4
        for (int part = span * in_span; part < min((span + 1) * in_span, parts); ++part)
          mix(sum, weights[part * group + h], reinterpret_cast<const float4*>(part_out(memory, part) + h * D)[column]);
        mix(total.out[0], span_weights[span * group + h], sum);
      }
      total.top = totals[h].x, total.sum = totals[h].y;
      const int64_t q = int64_t{b} * p.size.Hq + head * group + h;
      total.write(static_cast<T*>(p.out) + q * D + column * 4, 0);
      if (column == 0) p.lse[q] = total.lse(softmax);
    }
  }

  __device__ void run() {
    cluster.barrier_arrive();  // so that no block sends before the other is there
    wait_for_previous_kernel();
    const int length = p.paging.length(b), n = p.paging.pages_of(length), count = min(n, p.K);
    const int start = p.append.paging.length(b);
    // Asked for before the lengths are there.
    const int tile = rank * kStepWarps + warp, page = find_page(tile), next = find_page(tile + blocks * kStepWarps);
    NewToken token;
    if (start < length) token = load_new_token(start);
    const bool scored = n > p.K && p.sink_pages + p.recent_pages < p.K;
    if (rank == 0 && n > p.K) prepare_selection(n);
    // The last page's bounds matter to the scores only where it is not read in any case.
    const bool bounds_first = p.recent_pages == 0;
    if (bounds_first) {
      store_new_token(token);
      __syncthreads();
      renew_bounds(token);
    }
    cluster.barrier_wait();
    if (bounds_first) cluster.sync();
    if (n <= p.K) list_all(n, length);
    if (scored) estimate(n, page, next);
    if (!bounds_first) store_new_token(token);
    cluster.sync();
    if (n > p.K && rank == 0) select(n, length);
    if (!bounds_first) {
      if (rank == 0) __syncthreads();  // it may be the last block too
      renew_bounds(token);
      __syncthreads();
    }
    if (n > p.K) cluster.sync();
    attend(count);
    start_next_kernel();
    cluster.sync();
    if (rank != 0) return;
    combine(count);
  }
};

#endif

template <class T, class Bound, int D>
__global__ void __launch_bounds__(kStepThreads, D <= 128 ? 2 : 1) decode_step_kernel(const StepParams p) {
#if __CUDA_ARCH__ >= 900
  extern __shared__ __align__(16) std::byte memory[];
  __shared__ typename StepBlock<T, Bound, D>::Shared shared;
  StepBlock<T, Bound, D> block{.p = p, .shared = shared, .memory = memory};
  block.run();
#endif
}

}  // namespace quest::cuda
