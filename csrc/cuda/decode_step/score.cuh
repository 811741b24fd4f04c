// Scores pages: the keys of a score split's pages, and the new token of its rows.
//
// A split is of several heads, a warp for each: the bounds of a page's heads lie together, and memory is faster where
// neighbours are read together.
#pragma once

#include "../tile/async_rows.cuh"
#include "../tile/page_scores.cuh"
#include "append.cuh"
#include "scheduler.cuh"
#include "select_pages.cuh"

namespace quest::cuda {

// The scores of pages r and r + 8 of a tile, reduced over `heads` of the group in the order of topk_pages. `reduced`
// has those of the group's heads before, unless these are the first.
__device__ __forceinline__ void reduce_group(
    float (&reduced)[2], const float (&scores)[4], int heads, GroupReduce how, bool first) {
  const int lane = threadIdx.x % kWarpSize, c = lane % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (how == GroupReduce::sum) {
      float x = __shfl_sync(kFullMask, scores[2 * half], lane - c);
      if (!first) x += reduced[half];
#pragma unroll
      for (int h = 1; h < kMmaHeads; ++h) {
        const float y = __shfl_sync(kFullMask, scores[2 * half + h % 2], lane - c + h / 2);
        if (h < heads) x += y;
      }
      reduced[half] = x;
    } else {
      float x = 2 * c < heads ? scores[2 * half] : -INFINITY;
      if (2 * c + 1 < heads) x = nan_max(x, scores[2 * half + 1]);
      x = nan_max(x, __shfl_xor_sync(kFullMask, x, 1));
      x = nan_max(x, __shfl_xor_sync(kFullMask, x, 2));
      if (!first) x = nan_max(reduced[half], x);
      reduced[half] = x;
    }
  }
}

template <class T, class Bound, int D, int kSlotBytes, int kHeadTiles>
struct PageScorer {
  static constexpr bool kCoded = kHasScales<Bound>;
  static constexpr int kAhead = kCoded ? 2 : 1;  // tiles whose bounds are being copied while one is scored
  // Bounds of 8 or 4 bits take one slot of three a tile, lower before upper. Others take one of two for lower, the
  // third for upper.
  static constexpr int kWarpSlotBytes = kSlotBytes / 3 / kStepWarps;
  using BoundsSlot = RowSlot<kBoundsRowBytes<Bound, D>, ReadBy::row>;
  using Selector = PageSelector<kSlotBytes>;

  struct Shared {
    float scales[kAhead + 1][kStepWarps][kMmaRows];
  };

  const Scheduler<kHeadTiles>& scheduler;
  Shared& shared;
  std::byte* const slots;
  const DecodeStepKernelParams& params = scheduler.params;
  const DecodeStepParams& p = scheduler.p;
  const int group = p.size.group(), lane = scheduler.lane, warp = scheduler.warp;

  __device__ std::byte* slot(int i) const { return slots + (i * kStepWarps + warp) * kWarpSlotBytes; }

  // The first of the warp's sixteen pages in a tile of the split.
  __device__ int first_page(const Split& split, int tile) const {
    return (split.index * scheduler.score_split_tiles + tile) * scheduler.tile_pages() +
           (warp >> params.score_heads_log2) * kMmaRows;
  }
  __device__ int head_of_warp(const Split& split) const { return split.head + (warp & (scheduler.tile_heads() - 1)); }
  // This lane's physical page of two tiles, from an even one on, or -1.
  __device__ int find_pages(const Split& split, int tile, int tiles) const {
    tile += lane / kMmaRows;
    const int page = first_page(split, tile) + lane % kMmaRows;
    return tile < tiles && page < scheduler.pages_of(split) ? p.paging.physical(split.b, page) : -1;
  }

  __device__ void copy_bounds(int head, int physical, std::byte* to, int which) const {
    const Bounds& from = p.append.k_bounds;
    const Bound* const row =
        static_cast<const Bound*>(from.data) + physical * from.stride_n + head * from.stride_h + which * from.stride_c;
    BoundsSlot::template copy<kCoded ? 2 * kMmaRows : kMmaRows>(to, physical < 0 ? nullptr : row, from.data);
  }
  __device__ void copy_first(int head, int physical, int stage) const {
    copy_bounds(head, physical, slot(stage), kCoded ? lane / kMmaRows : 0);
    if constexpr (kCoded) {
      const Bounds& from = p.append.k_bounds;
      const float* const scale = from.scales + max(physical, 0) * from.scales_stride_n + head * from.scales_stride_h;
      if (lane < kMmaRows) copy_async_4(&shared.scales[stage][warp][lane], scale);
    }
  }

  // Writes the keys of the warp's pages from `first` on.
  __device__ void score_tile(
      const Split& split, int first, int physical, int stage,
      const SignedQuery<T, Bound, D> (&query)[kHeadTiles]) const {
    const int r = lane / 4, c = lane % 4;
    PageScoreTile<T, Bound, D> tile;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = r + half * 8;
      tile.scale[half] = kCoded ? shared.scales[stage][warp][row] : 1.f;
#pragma unroll
      for (int i = 0; i < decltype(tile)::Row::kCount; ++i) {
        if constexpr (std::is_same_v<Bound, Nibbles>) {
          tile.lower[half].at[i] = BoundsSlot::read_8(slot(stage), row, 4 * i + c);
          tile.upper[half].at[i] = BoundsSlot::read_8(slot(stage), row + kMmaRows, 4 * i + c);
        } else {
          tile.lower[half].at[i] = BoundsSlot::read(slot(stage), row, 4 * i + c);
          tile.upper[half].at[i] = kCoded ? BoundsSlot::read(slot(stage), row + kMmaRows, 4 * i + c)
                                          : BoundsSlot::read(slot(2), row, 4 * i + c);
        }
      }
    }
    float scores[4], reduced[2];
    tile.score(scores, query[0]);
    reduce_group(reduced, scores, kHeadTiles == 1 ? group : kMmaHeads, p.reduce, true);
    if constexpr (kHeadTiles == 2) {
      tile.unpack_anew();
      tile.score(scores, query[1]);
      reduce_group(reduced, scores, group - kMmaHeads, p.reduce, false);
    }
    // Of the four lanes of a row pair, lanes c = 0, 1 take pages r and r + 8.
    const float score = c & 1 ? reduced[1] : reduced[0];
    const bool invalid = __shfl_sync(kFullMask, physical, r + c % 2 * 8) < 0;
    const int n = scheduler.pages_of(split), K = scheduler.selected(split.b), page = first + r + c * 8;
    const bool candidate = page >= p.sink_pages && page < n - p.recent_pages;
    const uint32_t key = page >= n ? kNoKey : candidate ? sort_key(invalid ? NAN : score) : kForcedKey;
    uint32_t* const keys = params.keys + (split.b * p.size.Hkv + head_of_warp(split)) * params.keys_stride;
    if (first < n && Selector::by_superpages(n, K)) {
      if (c < 2) keys[page] = key;
      const uint32_t best = __reduce_max_sync(kFullMask, c < 2 ? key : kNoKey);
      const int superpage = first / kSuperpage + lane, all = superpages_of(n);
      if (lane == 0 || (superpage >= all && superpage < whole_vecs(all)))
        keys[key_room(p.paging.P) + Selector::key_place(superpage, all)] = lane == 0 ? best : kNoKey;
    } else if (c < 2 && page < whole_vecs(n)) {
      keys[Selector::key_place(page, n)] = key;
    }
    __syncwarp();  // the slots are free now
  }

  __device__ void score_split(const Split& split) const {
    const int n = scheduler.pages_of(split), K = scheduler.selected(split.b);
    const int tiles = min(
        scheduler.score_split_tiles, scheduler.score_tiles(split.b, n, K) - split.index * scheduler.score_split_tiles);
    const int head = head_of_warp(split), r = lane / 4;
    const T* const heads = static_cast<const T*>(p.q.data) + split.b * p.q.stride_b + head * group * p.q.stride_h;
    SignedQuery<T, Bound, D> query[kHeadTiles];
#pragma unroll
    for (int i = 0; i < kHeadTiles; ++i) {
      const int h = i * kMmaHeads + r;
      query[i].positive.load(h < group ? heads + h * p.q.stride_h : nullptr);
    }
    // The block that has the last split of its rows appends their new token. Its loads are in flight while bounds are
    // scored.
    const bool appends = warp < scheduler.tile_heads() && split.index == split.count - 1;
    const NewToken<T, D> token =
        NewToken<T, D>::load(p, scheduler.shared.starts[split.b], appends ? split.length : 0, split.b, head);
    int pages[kAhead + 1];  // of the tiles being copied, the latest last
#pragma unroll
    for (int i = 0; i <= kAhead; ++i) pages[i] = -1;
    int two = find_pages(split, 0, tiles), next_two = find_pages(split, 2, tiles);
#pragma unroll 1
    for (int tile = -kAhead; tile < tiles; ++tile) {
      const int ahead = tile + kAhead;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) pages[i] = pages[i + 1];
      if (ahead > 0 && ahead % 2 == 0) two = next_two, next_two = find_pages(split, ahead + 2, tiles);
      const int page = __shfl_sync(kFullMask, two, ahead % 2 * kMmaRows + lane % kMmaRows);
      pages[kAhead] = page;
      if (ahead < tiles) copy_first(head, page, ahead % (kAhead + 1));
      commit_copies();
      if (tile >= 0) {
        if (tile == 0)
#pragma unroll
          for (int i = 0; i < kHeadTiles; ++i) query[i].split();
        wait_copies<kAhead>();
        score_tile(split, first_page(split, tile), pages[0], tile % (kAhead + 1), query);
      }
      if constexpr (!kCoded) {
        if (ahead < tiles) copy_bounds(head, page, slot(2), 1);
        commit_copies();
      }
    }
    token.store(p, scheduler.shared.starts[split.b], head);
  }

  __device__ void run() const {
    for (int stage = 0;; stage ^= 1) {
      const Split split = scheduler.shared.score[stage];
      if (split.row < 0) {
        // The last that any block takes. The compiler spills registers where the new value is computed.
        if (split.index == gridDim.x - 1 && scheduler.is_first())
          atomicAnd(&params.taken->score, kOddStep), atomicXor(&params.taken->score, kOddStep);
        return;
      }
      uint32_t next = 0;
      if (scheduler.is_second()) next = atomicAdd(&params.taken->score, 1) & ~kOddStep;
      score_split(split);
      if (scheduler.is_second()) scheduler.describe_score(next, stage ^ 1);
      __syncthreads();
      if (scheduler.is_first()) add_release(&params.rows[split.row].scored, 1);
    }
  }
};

}  // namespace quest::cuda
