// Attends: selects the pages of a split, reads them, and combines the row's partials where the split is its last.
#pragma once

#include "../tile/attend_loop.cuh"
#include "../tile/attend_mma.cuh"
#include "append.cuh"
#include "scheduler.cuh"
#include "select_pages.cuh"

namespace quest::cuda {

template <class T, int D, int kSlotBytes, int kHeadTiles>
struct RowAttender {
  using Attend = MmaAttend<T, D>;
  using Merge = WarpMerge<Attend>;
  using Combiner = Combine<T, D>;
  using CombineShared = typename Combiner::template Shared<kMmaHeads>;
  using Selector = PageSelector<kSlotBytes>;
  static_assert(Attend::kThreads == kStepThreads && kCombineThreads == kStepThreads);
  static_assert(kSlotBytes == Attend::shared_bytes(D));
  static_assert(sizeof(CombineShared) <= kSlotBytes);
  static_assert(kStepWarps * sizeof(typename BoundsRenewal<T, D>::Shared) <= kSlotBytes);

  struct Shared {
    int is_last;
    WarpStates<kStepWarps> warps;
    typename Attend::Shared attend;
  };

  const Scheduler<kHeadTiles>& scheduler;
  Shared& shared;
  std::byte* const slots;
  const DecodeStepKernelParams& params = scheduler.params;
  const DecodeStepParams& p = scheduler.p;
  const int group = p.size.group();

  // Of an attend split: its KV head, the row that selects its pages, and its query heads among those of the row.
  __device__ int kv_head(const Split& split) const { return split.head / kHeadTiles; }
  __device__ int scored_row(const Split& split) const { return split.row / kHeadTiles; }
  __device__ int first_head(const Split& split) const { return split.head % kHeadTiles * kMmaHeads; }
  __device__ int heads(const Split& split) const {
    return kHeadTiles == 1 ? group : min(kMmaHeads, group - first_head(split));
  }

  // Lists entries [first, end) of the row's pages, in shared and device memory. Every block of the row selects for
  // itself: a list from another block would arrive no earlier.
  __device__ void list_pages(const Split& split, int first, int end) const {
    const int n = scheduler.pages_of(split), K = scheduler.selected(split.b);
    const bool scored = scheduler.is_scored(split.b, n, K), last = split.index == split.count - 1;
    Selector row{
        .keys = params.keys + scored_row(split) * params.keys_stride,
        .pages = p.pages + int64_t{scored_row(split)} * p.pages_stride,
        .table = p.paging.page_table + split.b * p.paging.page_table_stride,
        .n = n,
        .K = K,
        .sink_pages = p.sink_pages,
        .recent_pages = p.recent_pages,
        .first = first,
        .end = end,
        .P = p.paging.P,
        .N = p.paging.N,
        .page_shift = p.paging.page_shift,
        .length = split.length};
    if (scored) {
      row.fetch_table();
      const int first_scored = scored_row(split) - (kv_head(split) & (scheduler.tile_heads() - 1));
      if (scheduler.is_first())
        wait_until_at_least(
            &params.rows[first_scored].scored, scheduler.shared.score_splits[split.b], scheduler.shared.odd);
      __syncthreads();
      Selector::select(row);
#pragma unroll 1
      for (int i = K + threadIdx.x; last && i < p.K; i += kStepThreads) row.pages[i] = -1;
    } else {
      list_unscored(
          row, p, kv_head(split), scheduler.shared.starts[split.b], split.b, scheduler.shared.keeps[split.b], last);
    }
    __syncthreads();
  }

  // Lists the entries of a row that is not scored: every page, the list that it keeps, or forced pages. The last split
  // appends the new token, as no score split has, and no other split reads its page. Splits of a group's other head
  // tile write the same. A function of its own, as cold code between hot code stalls on instruction fetch.
  static __device__ __noinline__ void list_unscored(
      Selector row, const DecodeStepParams& p, int head, int start, int b, bool keeps, bool last) {
    // By a warp that rarely lists pages.
    if (last && threadIdx.x / kWarpSize == kStepWarps - 1)
      NewToken<T, D>::load(p, start, row.length, b, head).store(p, start, head);
    const int until = last && !p.dense ? p.K : row.end;
#pragma unroll 1
    for (int i = row.first + threadIdx.x; i < until; i += kStepThreads) {
      if (i >= min(row.n, row.K))
        row.pages[i] = -1;
      else if (keeps && row.n > row.K && i < row.K - row.recent_pages)
        row.put_kept(i);
      else
        row.put(i, row.n > row.K && i >= row.sink_pages ? row.n - row.K + i : i);
    }
  }

  // The physical page of a token of the split's list of `entries` pages.
  __device__ int find_token(int token, int entries) const {
    const int entry = token >> p.paging.page_shift;
    if (entry >= entries) return kNoToken;
    const ListedPage page = SelectMemory<kSlotBytes>::get().pages[entry];
    return (token & (p.paging.page_size() - 1)) < page.tokens ? page.physical : kNoToken;
  }

  __device__ void store_partial(const Split& split, int partial, const typename Merge::State& state) const {
    if (Merge::head() >= heads(split)) return;
    const int64_t head = int64_t{scored_row(split)} * group + first_head(split) + Merge::head();
#pragma unroll
    for (int i = 0; i < Merge::kVecs; ++i) {
      const int vec = Merge::first_vec() + i * Merge::kHeadThreads;
      if (vec * 4 < D) params.partials.store(head, partial, D, vec, state.out[i]);
    }
    if (Merge::first_vec() == 0) params.partials.store(head, partial, state.max, state.sum);
  }

  __device__ void attend_split(const Split& split, Attend& attend, const Softmax& softmax) const {
    const int split_tiles = scheduler.shared.attend_split_tiles, partial_tiles = scheduler.shared.partial_tiles;
    const int pages = scheduler.pages_of(split), K = scheduler.selected(split.b);
    const int entries = min(pages, K), first_tile = split.index * split_tiles;
    const int tiles = min(split_tiles, scheduler.attend_tiles(pages, K) - first_tile);
    const int first_token = first_tile * kTileTokens, first = first_token >> p.paging.page_shift;
    const int end = min(entries, (first_token + tiles * kTileTokens) >> p.paging.page_shift);
    list_pages(split, first, end);
    const QueryTile<T> query{
        .data = static_cast<const T*>(p.q.data) + split.b * p.q.stride_b +
                (kv_head(split) * group + first_head(split)) * p.q.stride_h,
        .stride = p.q.stride_h,
        .heads = heads(split),
        .kv_head = kv_head(split)};
    const int own_token = scheduler.warp * Attend::kTokens + scheduler.lane % Attend::kTokens;
    typename Merge::State partial;
    attend_tiles(
        attend, softmax, p.append.k_cache, p.append.v_cache, query, D, first_token, first_token + tiles * kTileTokens,
        p.paging.page_size(), shared.warps, shared.attend,
        [&](int offset) { return find_token(own_token + offset, end - first); },
        [&](int tile, const typename Merge::State& state) {
          partial.merge(state, softmax);
          if ((tile + 1) % partial_tiles != 0 && tile != tiles - 1) return;
          store_partial(split, (first_tile + tile) / partial_tiles, partial);
          partial = {};
        });
  }

  __device__ void combine(const Split& split) const {
    const int tiles = scheduler.attend_tiles(scheduler.pages_of(split), scheduler.selected(split.b));
    const int partial_tiles = scheduler.shared.partial_tiles;
    Partials partials = params.partials;
    partials.tiles = partial_tiles;
    const int64_t head = int64_t{split.b} * p.size.Hq + kv_head(split) * group + first_head(split);
    Combiner::template run<kMmaHeads>(
        {.partials = partials,
         .first_head = int64_t{scored_row(split)} * group + first_head(split),
         .heads = heads(split),
         .count = partial_tiles == 1 ? tiles : (tiles + kSupertile - 1) / kSupertile,
         .scale = p.scale,
         .out = static_cast<T*>(p.out) + head * D,
         .lse = p.lse + head},
        *reinterpret_cast<CombineShared*>(slots));
  }

  __device__ void run() const {
    const Softmax softmax(p.scale);
    Attend attend(D, shared.attend, slots);
    for (int stage = 0;; stage ^= 1) {
      const Split& split = scheduler.shared.attend[stage];
      // Past the last split, blocks take the renewal of bounds, a row a warp.
      const int renewed_row = split.index * kStepWarps;
      if (split.row < 0 && renewed_row >= p.size.B * p.size.Hkv) {
        if (scheduler.is_last_attend_split(split.index) && scheduler.is_first())
          scheduler.leave_counters(params.rows, p.size.B * p.size.Hkv, params.max_rows, params.taken);
        return;
      }
      int next = 0;
      if (scheduler.is_second()) next = atomicAdd(&params.taken->attend, 1);
      if (split.row < 0) {
        BoundsRenewal<T, D>::run(
            scheduler, renewed_row, reinterpret_cast<typename BoundsRenewal<T, D>::Shared*>(slots));
        __syncthreads();
        if (scheduler.is_second()) scheduler.describe_attend(next, stage ^ 1);
        __syncthreads();
        continue;
      }
      attend_split(split, attend, softmax);
      if (scheduler.is_first())
        shared.is_last = add_acquire_release(&params.rows[split.row].attended, 1) == split.count - 1;
      if (scheduler.is_second()) scheduler.describe_attend(next, stage ^ 1);
      __syncthreads();
      if (shared.is_last) {
        if (scheduler.is_first()) {
          params.rows[split.row].attended = 0;
          if (first_head(split) == 0) params.rows[scored_row(split)].scored = scheduler.shared.odd ^ kOddStep;
        }
        combine(split);
      }
    }
  }
};

}  // namespace quest::cuda
