// The scheduler: cuts a step's work into splits by the live lengths, and hands them to the blocks.
#pragma once

#include "params.cuh"

namespace quest::cuda {

// A split that the block has taken: a share of the pages to score of some rows, or of the tokens to attend to of one.
struct Split {
  int row, b, head;  // the first row, its sequence and KV head (or head tile of one); row is -1 past the last split
  int index, count;  // split `index` of the row's `count`; past the last split, index counts on from zero
  int length;        // of the sequence, with the new token; 0 if it is idle
};

template <int kHeadTiles>
struct Scheduler {
  struct Shared {
    int lengths[kMaxSequences], starts[kMaxSequences];          // with the new token, and before it
    int selected[kMaxSequences];                                // pages, if it has as many
    bool keeps[kMaxSequences];                                  // its lists of an earlier step
    int score_splits[kMaxSequences];                            // of a row
    int score_ends[kMaxSequences], attend_ends[kMaxSequences];  // splits of all sequences up to this one
    int2 sums[kStepWarps];
    TakenSplits first;
    int attend_split_tiles;     // at most; in shared memory, as the kernel has no register to spare
    int partial_tiles;          // of each partial: 1 or kSupertile
    Split score[2], attend[2];  // the current split, and the next
    uint32_t odd;               // kOddStep or 0
  };

  const DecodeStepKernelParams& params;
  const DecodeStepParams& p;
  Shared& shared;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  int score_split_tiles;  // at most: 1 or 2, so that blocks which memory serves sooner score more splits

  __device__ Scheduler(const DecodeStepKernelParams& params, Shared& shared)
      : params(params), p(params.op), shared(shared) {}

  // The last attend splits are renewals of bounds, a row a warp. Behind them every block takes one more.
  __device__ bool is_last_attend_split(int index) const {
    return index == (p.size.B * p.size.Hkv + kStepWarps - 1) / kStepWarps + gridDim.x - 1;
  }
  // By one thread, when all blocks have taken their last attend split. Rows that this step lacks pass a step too.
  static __device__ __noinline__ void leave_counters(RowCounters* rows, int used, int count, TakenSplits* taken) {
    taken->attend = 0;
#pragma unroll 1
    for (int i = used; i < count; ++i) atomicXor(&rows[i].scored, static_cast<int>(kOddStep));
  }

  __device__ int pages_of(const Split& split) const { return p.paging.pages_of(split.length); }

  // Attention: a head tile of a row is attended to by itself.
  __device__ int attend_heads() const { return p.size.Hkv * kHeadTiles; }

  // Scoring: a tile is tile_pages() pages of tile_heads() KV heads.
  __device__ int tile_heads() const { return 1 << params.score_heads_log2; }
  __device__ int head_tiles() const { return p.size.Hkv >> params.score_heads_log2; }
  __device__ int tile_pages() const { return kStepWarps * kMmaRows >> params.score_heads_log2; }
  // K: a sequence's selected pages.
  __device__ int selected(int b) const { return shared.selected[b]; }
  // Whether scores decide which K pages are selected.
  __device__ bool is_scored(int b, int pages, int K) const {
    return pages > K && p.sink_pages + p.recent_pages < K && !shared.keeps[b];
  }
  __device__ int score_tiles(int b, int pages, int K) const {
    const int row_tiles = (pages + kMmaRows - 1) / kMmaRows;
    return is_scored(b, pages, K) ? ((row_tiles << params.score_heads_log2) + kStepWarps - 1) / kStepWarps : 0;
  }

  // Attention: a tile is kTileTokens tokens of a row's list.
  __device__ int attend_tiles(int pages, int K) const {
    return max(1, ((min(pages, K) << p.paging.page_shift) + kTileTokens - 1) / kTileTokens);
  }

  // Takes the block's first splits, and cuts the work, a thread for each sequence.
  __device__ void cut() {
    TakenSplits taken{};
    if (is_first()) taken = TakenSplits::take_both(params.taken);
    const Paging& g = p.paging;
    const int b = threadIdx.x;
    int tiles_to_score = 0, tiles_to_attend = 0;
    if (b < p.size.B) {
      const int length = g.visible(b, 0, 1), pages = g.pages_of(length), K = pages_to_select(p, b, length);
      shared.lengths[b] = length, shared.starts[b] = p.append.paging.length(b);
      shared.selected[b] = K, shared.keeps[b] = p.kept.keeps(b);
      tiles_to_score = score_tiles(b, pages, K), tiles_to_attend = attend_tiles(pages, K);
    }
    const int2 all = sum(tiles_to_score * head_tiles(), tiles_to_attend * attend_heads(), true);
    score_split_tiles = all.x > gridDim.x ? 2 : 1;
    // Short lists get partials of a tile, as the host does not know the lengths.
    int partial_tiles = params.partials.tiles;
    if (partial_tiles > 1) {
      const bool fits = !__syncthreads_or(tiles_to_attend > params.partials.count);
      if (fits && all.y < params.large_tiles) partial_tiles = 1;
    }
    // A split is whole partials, and no longer than the list that shared memory holds. A dense split selects nothing,
    // so it begins soon: short ones keep all blocks busy to the end of a long row.
    const int longest = (kMaxListedPages / kTileTokens) << p.paging.page_shift;
    const int each = partial_tiles * params.attend_splits;
    int attend_split_tiles = min((all.y + each - 1) / each * partial_tiles, longest);
    if (p.dense && attend_split_tiles > 4 * kSupertile) attend_split_tiles = kSupertile;
    const int score_splits = (tiles_to_score + score_split_tiles - 1) >> (score_split_tiles - 1);
    const int attend_splits = (tiles_to_attend + attend_split_tiles - 1) / attend_split_tiles;
    const int2 ends = sum(head_tiles() * score_splits, attend_heads() * attend_splits, false);
    if (b < p.size.B) {
      shared.score_splits[b] = score_splits;
      shared.score_ends[b] = ends.x, shared.attend_ends[b] = ends.y;
    }
    if (is_first()) {
      shared.odd = taken.score & kOddStep, taken.score &= ~kOddStep;
      shared.first = taken, shared.attend_split_tiles = attend_split_tiles, shared.partial_tiles = partial_tiles;
    }
    __syncthreads();
    if (is_first()) describe_score(shared.first.score, 0);
    if (is_second()) describe_attend(shared.first.attend, 0);
    __syncthreads();
  }

  // Sums over the threads up to this one, or over all. Threads past the last sequence have zeros.
  __device__ int2 sum(int x, int y, bool all) const {
    if (p.size.B == 1) {
      // Only thread 0 has anything.
      if (!all) return {x, y};
      if (threadIdx.x == 0) shared.sums[0] = {x, y};
      __syncthreads();
      return shared.sums[0];
    }
#pragma unroll
    for (int step = 1; step < kWarpSize; step *= 2) {
      const int a = __shfl_up_sync(kFullMask, x, step), b = __shfl_up_sync(kFullMask, y, step);
      if (lane >= step) x += a, y += b;
    }
    __syncthreads();
    if (lane == kWarpSize - 1) shared.sums[warp] = {x, y};
    __syncthreads();
    if (all) x = y = 0;
#pragma unroll 1
    for (int w = 0; w < (all ? kStepWarps : warp); ++w) x += shared.sums[w].x, y += shared.sums[w].y;
    return {x, y};
  }

  // By one thread, for the block. Cold code stalls on instruction fetch, so there is one copy of it.
  static __device__ __noinline__ void describe(
      Split& split, const int* ends, const int* lengths, int sequences, int head_tiles, int heads, int item) {
    Split at{};
    at.row = -1, at.index = item - ends[sequences - 1];
    if (at.index < 0) {
      int low = 0, high = sequences - 1;
#pragma unroll 1
      while (low < high) {
        const int middle = (low + high) / 2;
        if (item < ends[middle])
          high = middle;
        else
          low = middle + 1;
      }
      const int before = low ? ends[low - 1] : 0;
      at.b = low, at.count = head_tiles == 1 ? ends[low] - before : (ends[low] - before) / head_tiles;
      const int head_tile = head_tiles == 1 ? 0 : (item - before) / at.count;
      at.head = head_tile * heads, at.index = item - before - head_tile * at.count;
      at.row = at.b * head_tiles * heads + at.head, at.length = lengths[low];
    }
    split = at;
  }
  __device__ void describe_score(int item, int stage) const {
    describe(shared.score[stage], shared.score_ends, shared.lengths, p.size.B, head_tiles(), tile_heads(), item);
  }
  __device__ void describe_attend(int item, int stage) const {
    describe(shared.attend[stage], shared.attend_ends, shared.lengths, p.size.B, attend_heads(), 1, item);
  }
  // Threads that work alone, each in a warp of its own.
  __device__ bool is_first() const { return threadIdx.x == 0; }
  __device__ bool is_second() const { return threadIdx.x == kWarpSize; }
};

}  // namespace quest::cuda
