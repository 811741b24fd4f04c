// decode_step: append, estimate, selection and attention of one new token by one launch.
//
// A row is a sequence and KV head. The work is cut into stretches of pages to score, lists of rows to make and runs of
// chunks to attend to; of stretches and runs there are about as many as blocks, by the lengths as they are. Blocks take
// them as they get to them: first stretches, then lists, then runs. A list waits for its row's stretches, a run for its
// row's list, and the block that is done last with a row's runs folds what they left. Work is only ever taken by a
// block that runs and waits only for work of the kind before: however few blocks there are at a time, all comes to an
// end.
//
// A stretch is of several heads, a warp for each: the bounds of a page's heads lie together, and memory is faster where
// neighbours are read together.
//
// Code that runs once is slow, for its instructions come from far: so one copy of each piece, and loops left rolled.
//
// The parts are those of estimate, topk_pages and sparse_decode, and so are the bits.
#pragma once

#include "attend_chunk.cuh"
#include "bounds_tile.cuh"
#include "page_bounds.cuh"
#include "select.cuh"
#include "step_params.cuh"

namespace quest::cuda {

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

template <class T, class Bound, int D>
struct StepBlock {
  using Attend = MmaAttend<T, D>;
  using Merge = ChunkMerge<Attend>;
  static_assert(Attend::kThreads == kStepThreads);
  static constexpr bool kBytes = sizeof(Bound) == 1;
  using BoundsSlot = RowSlot<D * sizeof(Bound), ReadBy::row>;

  static constexpr int kMostChosen = 512;        // pages of a list whose numbers are kept in shared memory
  static constexpr int kAhead = kBytes ? 2 : 1;  // tiles whose bounds are on their way while one is scored

  // A stretch or run that the block has taken; row is -1 past the last.
  struct Work {
    int row, b, head, i, count;  // the i-th of `count` of the row, or of the rows from it on
    int length;                  // of the sequence, with the new token
  };
  struct Shared {
    int lengths[kMostSequences], starts[kMostSequences];  // with the new token, and before it
    int ends[2][kMostSequences];                          // of the stretches, of the runs: of all sequences up to this
    int2 sums[kStepWarps];
    Work stretch, run;
    int list, place, last;  // place: among the blocks, as they began
    float scales[kAhead + 1][kStepWarps][kMmaRows];
    union {
      SelectShared<kStepThreads> select;
      WarpResults<kStepWarps> results;
    };
    int chosen[kMostChosen];
    typename Attend::Shared attend;
  };

  const StepParams& p;
  Shared& shared;
  std::byte* const memory;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int group = p.size.group();
  int stretch_tiles, run_chunks;  // at most

  __device__ QueryTile<T> query_of(const Work& at) const {
    return {
        static_cast<const T*>(p.q.data) + at.b * p.q.stride_b + at.head * group * p.q.stride_h, p.q.stride_h, group,
        at.head};
  }
  __device__ RowProgress& progress_of(const Work& at) const { return p.progress->rows[at.row]; }
  __device__ int pages_of(const Work& at) const { return p.paging.pages_of(at.length); }
  __device__ int tile_pages() const { return kStepWarps * kMmaRows >> p.score_shift; }
  __device__ int score_heads() const { return 1 << p.score_shift; }
  __device__ int score_groups() const { return p.size.Hkv >> p.score_shift; }
  __device__ int tiles_of(int pages) const {
    return is_scored(pages) ? (((pages + kMmaRows - 1) / kMmaRows << p.score_shift) + kStepWarps - 1) / kStepWarps : 1;
  }
  // Whether scores decide anything.
  __device__ bool is_scored(int pages) const { return pages > p.K && p.sink_pages + p.recent_pages < p.K; }

  __device__ int chunks_of(int pages) const {
    return max(1, ((min(pages, p.K) << p.paging.page_shift) + kChunkTokens - 1) / kChunkTokens);
  }

  // The lengths, how the work is cut, and where in its order each sequence begins. By a thread a sequence.
  __device__ void plan() {
    const Paging& g = p.paging;
    const int b = threadIdx.x;
    int tiles = 0, chunks = 0;
    if (b < p.size.B) {
      const int length = g.length(b), pages = g.pages_of(length);
      shared.lengths[b] = length, shared.starts[b] = p.append.paging.length(b);
      tiles = tiles_of(pages), chunks = chunks_of(pages);
    }
    const int2 all = sum(tiles * score_groups(), chunks * p.size.Hkv, kWarpSize);
    const int blocks = gridDim.x;
    stretch_tiles = (all.x + blocks - 1) / blocks;
    run_chunks = p.part_chunks == 1 ? (all.y + blocks - 1) / blocks : p.part_chunks;
    const int2 ends =
        sum(score_groups() * ((tiles + stretch_tiles - 1) / stretch_tiles),
            p.size.Hkv * ((chunks + run_chunks - 1) / run_chunks), warp + 1);
    if (b < p.size.B) shared.ends[0][b] = ends.x, shared.ends[1][b] = ends.y;
    __syncthreads();
  }
  // The sums over the threads up to this one, or over all of so many warps if that is more. Threads past the sequences
  // have zeros.
  __device__ int2 sum(int x, int y, int warps) const {
    if (p.size.B == 1) {
      // Thread 0 alone has something.
      if (warps < kWarpSize) return {x, y};
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
    const bool all = warps == kWarpSize;
    if (all) x = y = 0;
#pragma unroll 1
    for (int w = 0; w < (all ? kStepWarps : warp); ++w) x += shared.sums[w].x, y += shared.sums[w].y;
    return {x, y};
  }

  // By one thread, to the block. One copy of the code: what runs once waits for its instructions.
  static __device__ __noinline__ void describe(
      Work& work, const int* ends, const int* lengths, int sequences, int groups, int heads, int item) {
    Work at{};
    at.row = -1;
    if (item < ends[sequences - 1]) {
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
      at.b = low, at.count = groups == 1 ? ends[low] - before : (ends[low] - before) / groups;
      const int group = groups == 1 ? 0 : (item - before) / at.count;
      at.head = group * heads, at.i = item - before - group * at.count;
      at.row = at.b * groups * heads + at.head, at.length = lengths[low];
    }
    work = at;
  }
  __device__ void describe_stretch(int item) const {
    describe(shared.stretch, shared.ends[0], shared.lengths, p.size.B, score_groups(), score_heads(), item);
  }
  __device__ void describe_run(int item) const {
    describe(shared.run, shared.ends[1], shared.lengths, p.size.B, p.size.Hkv, 1, item);
  }
  // Threads that do something by themselves, each in a warp of its own.
  __device__ bool is_first() const { return threadIdx.x == 0; }
  __device__ bool is_second() const { return threadIdx.x == kWarpSize; }
  __device__ bool is_third() const { return threadIdx.x == 2 * kWarpSize; }
  __device__ bool is_fourth() const { return threadIdx.x == 3 * kWarpSize; }

  // ---------------------------------------------------------------------------------------------------------- scoring

  __device__ std::byte* slot(int i) const { return memory + (i * kStepWarps + warp) * Attend::kSlotBytes; }

  // The first page of the warp's sixteen of a stretch's tile.
  __device__ int first_page(const Work& at, int tile) const {
    return (at.i * stretch_tiles + tile) * tile_pages() + (warp >> p.score_shift) * kMmaRows;
  }
  // The head that the warp scores.
  __device__ int score_head(const Work& at) const { return at.head + (warp & (score_heads() - 1)); }
  // This lane's physical page of two tiles from an even one on, or -1.
  __device__ int find_pages(const Work& at, int tile, int tiles) const {
    tile += lane / kMmaRows;
    const int page = first_page(at, tile) + lane % kMmaRows;
    return tile < tiles && page < pages_of(at) ? p.paging.physical(at.b, page) : -1;
  }

  // 8-bit bounds take one slot of three, lower before upper; of others lower takes one of two, and upper the third.
  __device__ void copy_bounds(int head, int physical, std::byte* to, int which) const {
    const Bounds& from = p.append.k_bounds;
    const Bound* const row =
        static_cast<const Bound*>(from.data) + physical * from.stride_n + head * from.stride_h + which * from.stride_c;
    BoundsSlot::template copy<kBytes ? 2 * kMmaRows : kMmaRows>(to, physical < 0 ? nullptr : row, from.data);
  }
  __device__ void copy_first(int head, int physical, int turn) const {
    copy_bounds(head, physical, slot(turn), kBytes ? lane / kMmaRows : 0);
    if constexpr (kBytes) {
      const Bounds& from = p.append.k_bounds;
      const float* const scale = from.scales + max(physical, 0) * from.scales_stride_n + head * from.scales_stride_h;
      if (lane < kMmaRows)
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(
                         static_cast<unsigned>(__cvta_generic_to_shared(&shared.scales[turn][warp][lane]))),
                     "l"(scale)
                     : "memory");
    }
  }

  // The keys of the warp's pages from `first` on.
  __device__ void score(const Work& at, int first, int physical, int turn, const SplitQuery<T, Bound, D>& query) const {
    const int r = lane / 4, c = lane % 4;
    BoundsTile<T, Bound, D> rows;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = r + half * 8;
      rows.scale[half] = kBytes ? shared.scales[turn][warp][row] : 1.f;
#pragma unroll
      for (int i = 0; i < decltype(rows)::Row::kCount; ++i) {
        rows.lower[half].at[i] = BoundsSlot::read(slot(turn), row, 4 * i + c);
        rows.upper[half].at[i] = kBytes ? BoundsSlot::read(slot(turn), row + kMmaRows, 4 * i + c)
                                        : BoundsSlot::read(slot(2), row, 4 * i + c);
      }
    }
    float scores[4];
    rows.score(scores, query);
    const float score = reduce_group(scores, group, p.reduce);
    const bool broken = __shfl_sync(kFullMask, physical, r + c % 2 * 8) < 0;
    const int n = pages_of(at), mine = first + r + c * 8;
    const bool candidate = mine >= p.sink_pages && mine < n - p.recent_pages;
    if (c < 2 && mine < n)
      p.keys[(at.b * p.size.Hkv + score_head(at)) * p.keys_stride + mine] =
          candidate ? sort_key(broken ? NAN : score) : kForcedKey;
    __syncwarp();  // the slots may be copied to anew
  }

  // The new token's keys and values, by the block that has the last stretch of its heads: asked for before the bounds
  // are, and stored when they have been scored.
  struct NewToken {
    static constexpr int kVecs = D * sizeof(T) / 16, kCount = (2 * kVecs + kWarpSize - 1) / kWarpSize;
    int physical = -1;
    uint4 at[kCount];
  };
  __device__ NewToken load_new_token(const Work& work) const {
    NewToken token;
    const int start = shared.starts[work.b], head = score_head(work);
    if (warp >= score_heads() || work.i != work.count - 1 || start >= work.length) return token;
    token.physical = p.paging.physical(work.b, start >> p.paging.page_shift);
#pragma unroll
    for (int j = 0; j < NewToken::kCount; ++j) {
      const int i = j * kWarpSize + lane;
      const NewTokens& from = i < NewToken::kVecs ? p.append.k : p.append.v;
      const T* const row = static_cast<const T*>(from.data) + work.b * from.stride_b + head * from.stride_h;
      token.at[j] = load_once(row + i % NewToken::kVecs * 8, i < 2 * NewToken::kVecs);
    }
    return token;
  }
  __device__ void store_new_token(const Work& work, const NewToken& token) const {
    if (token.physical < 0) return;
    const int slot = shared.starts[work.b] & (p.paging.page_size() - 1), head = score_head(work);
#pragma unroll
    for (int j = 0; j < NewToken::kCount; ++j) {
      const int i = j * kWarpSize + lane;
      if (i >= 2 * NewToken::kVecs) continue;
      const Cache& to = i < NewToken::kVecs ? p.append.k_cache : p.append.v_cache;
      T* const row = static_cast<T*>(to.data) + token.physical * to.stride_n + head * to.stride_h + slot * to.stride_s;
      *reinterpret_cast<uint4*>(row + i % NewToken::kVecs * 8) = token.at[j];
    }
  }

  // The row's list, to device memory. The slots are free.
  __device__ void make_list(const Work& at) {
    const int n = pages_of(at);
    int32_t* const pages = p.pages + int64_t{at.row} * p.K;
    ListedPage* const list = p.list + int64_t{at.row} * p.K;
    const bool scored = is_scored(n), here = p.K <= kMostChosen;
    if (scored) {
      const int fours = own_fours<kStepThreads>(n);
      const uint4* const keys = reinterpret_cast<const uint4*>(p.keys + at.row * p.keys_stride);
      uint4* const kept = reinterpret_cast<uint4*>(memory);
      const bool fits = four_place(fours * kStepThreads) * int{sizeof(uint4)} <= Attend::shared_bytes(D);
      const auto load = [&](int i) {
        const int left = n - i * kLaneKeys;
        uint4 four{kNoKey, kNoKey, kNoKey, kNoKey};
        if (left > 0) four = __ldcg(keys + i);
        if (left < 2) four.y = kNoKey;
        if (left < 3) four.z = kNoKey;
        if (left < 4) four.w = kNoKey;
        return four;
      };
      SeenKeys seen;
#pragma unroll 4
      for (int i = threadIdx.x; i < fours * kStepThreads; i += kStepThreads) {
        const uint4 four = load(i);
        seen.see(four.x), seen.see(four.y), seen.see(four.z), seen.see(four.w);
        if (fits) kept[four_place(i)] = four;
      }
      select_best<kStepThreads>(
          n, p.K, p.sink_pages + p.recent_pages, seen, shared.select,
          [&](int j) {
            const int i = fours * threadIdx.x + j;
            return fits ? kept[four_place(i)] : load(i);
          },
          [&](int place, int page) { here ? shared.chosen[place] = page : pages[place] = page; });
      __syncthreads();
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < p.K; i += kStepThreads) {
      int page = i < n ? i : -1;
      if (scored)
        page = here ? shared.chosen[i] : pages[i];
      else if (n > p.K && i >= p.sink_pages)
        page = n - p.K + i;
      pages[i] = page;
      if (page < 0) continue;
      const int physical = p.paging.physical(at.b, page);
      const int tokens = min(p.paging.page_size(), at.length - (page << p.paging.page_shift));
      list[i] = {physical < 0 ? kBrokenPage : physical, tokens};
    }
    __syncthreads();
    if (threadIdx.x == 0) store_release(&progress_of(at).listed, 1);
  }

  __device__ void score_stretch(const Work& at) const {
    const int n = pages_of(at);
    const int tiles = is_scored(n) ? min(stretch_tiles, tiles_of(n) - at.i * stretch_tiles) : 0;
    const int head = score_head(at), r = lane / 4;
    const T* const heads = static_cast<const T*>(p.q.data) + at.b * p.q.stride_b + head * group * p.q.stride_h;
    SplitQuery<T, Bound, D> query;
    query.positive.load(r < group ? heads + r * p.q.stride_h : nullptr);
    const NewToken token = load_new_token(at);
    int pages[kAhead + 1];  // of the tiles that are on their way, the latest last
#pragma unroll
    for (int i = 0; i <= kAhead; ++i) pages[i] = -1;
    int two = find_pages(at, 0, tiles), next_two = find_pages(at, 2, tiles);
#pragma unroll 1
    for (int tile = -kAhead; tile < tiles; ++tile) {
      const int coming = tile + kAhead;
#pragma unroll
      for (int i = 0; i < kAhead; ++i) pages[i] = pages[i + 1];
      if (coming > 0 && coming % 2 == 0) two = next_two, next_two = find_pages(at, coming + 2, tiles);
      const int page = __shfl_sync(kFullMask, two, coming % 2 * kMmaRows + lane % kMmaRows);
      pages[kAhead] = page;
      if (coming < tiles) copy_first(head, page, coming % (kAhead + 1));
      end_copies();
      if (tile >= 0) {
        if (tile == 0) query.split();
        wait_copies<kAhead>();
        score(at, first_page(at, tile), pages[0], tile % (kAhead + 1), query);
      }
      if constexpr (!kBytes) {
        if (coming < tiles) copy_bounds(head, page, slot(2), 1);
        end_copies();
      }
    }
    store_new_token(at, token);
  }

  __device__ void score_rows() {
    for (;;) {
      const Work at = shared.stretch;
      if (at.row < 0) return;
      int next = 0;
      if (is_second()) next = atomicAdd(&p.progress->stretches, 1);
      score_stretch(at);
      __syncthreads();
      if (is_first()) add_acquire_release(&progress_of(at).scored, 1);
      if (is_second()) describe_stretch(next);
      __syncthreads();
    }
  }

  __device__ void make_lists() {
    for (int row = shared.list; row < p.size.B * p.size.Hkv; row = shared.list) {
      Work at{};
      at.row = row, at.b = row / p.size.Hkv, at.length = shared.lengths[at.b];
      const int head = row % p.size.Hkv, stretches = (tiles_of(pages_of(at)) + stretch_tiles - 1) / stretch_tiles;
      if (is_first()) wait_for(&p.progress->rows[row - (head & (score_heads() - 1))].scored, stretches);
      __syncthreads();
      make_list(at);
      if (is_third()) shared.list = atomicAdd(&p.progress->lists, 1);
      __syncthreads();
    }
  }

  // The bounds of the pages that the new tokens are in, a warp a row. Nobody reads them in this step, and while lists
  // are made there is time: by those blocks that came last, who make none.
  __device__ void renew_rows(int block) const {
#pragma unroll 1
    for (int row = block * kStepWarps + warp; row < p.size.B * p.size.Hkv; row += gridDim.x * kStepWarps) {
      const int b = row / p.size.Hkv, head = row - b * p.size.Hkv, start = shared.starts[b];
      const int page = p.paging.physical(b, start >> p.paging.page_shift);
      if (start >= shared.lengths[b] || page < 0) continue;
      const T* const fresh =
          static_cast<const T*>(p.append.k.data) + b * p.append.k.stride_b + head * p.append.k.stride_h;
      renew_page_bounds_by_warp<T, Bound, D>(
          p.append.k_cache, p.append.k_bounds, page, head, (start & (p.paging.page_size() - 1)) + 1, fresh);
    }
  }

  // -------------------------------------------------------------------------------------------------------- attention

  // This lane's token of a row's list, by its place there.
  __device__ int find_token(const Work& at, int token) const {
    const int entry = token >> p.paging.page_shift;
    if (entry >= min(pages_of(at), p.K)) return kNoToken;
    const int2 page = __ldcg(reinterpret_cast<const int2*>(p.list) + int64_t{at.row} * p.K + entry);
    return (token & (p.paging.page_size() - 1)) < page.y ? page.x : kNoToken;
  }

  __device__ void store_part(int row, int part, const typename Merge::Chunk& result) const {
    if (Merge::head() >= group) return;
    const int64_t at = (int64_t{row} * p.most_parts + part) * group + Merge::head();
#pragma unroll
    for (int i = 0; i < Merge::kColumns; ++i) {
      const int column = Merge::first_column() + i * Merge::kHeadThreads;
      if (column * 4 < D) __stcg(reinterpret_cast<float4*>(p.outs + at * D) + column, result.out[i]);
    }
    if (Merge::first_column() == 0) __stcg(p.sums + at, float2{result.top, result.sum});
  }

  // A span's parts of one head, from part `first` on, folded for one column by each lane. The lanes share the weights
  // out: what fold() would do part by part, each lane does once, for all columns.
  __device__ Partial<1> fold_span(
      const float2* sums, const float* outs, int first, int parts, int column, const Softmax& softmax) const {
    const int part = lane / 2;
    float2 scalars{-INFINITY, 0.f};
    if (part < parts) scalars = __ldcg(sums + (first + part) * group);
    float4 out[kSpanChunks];
#pragma unroll
    for (int i = 0; i < kSpanChunks; ++i)
      if (i < parts && column * 4 < D)
        out[i] = __ldcg(reinterpret_cast<const float4*>(outs + (first + i) * group * D) + column);
    float both = scalars.x;  // the largest up to this part
#pragma unroll
    for (int step = 2; step < 2 * kSpanChunks; step *= 2) {
      const float other = __shfl_up_sync(kFullMask, both, step);
      if (lane >= step) both = fmaxf(both, other);
    }
    const float before = __shfl_up_sync(kFullMask, both, 2);
    // Even lanes weigh what is folded so far, odd ones the part.
    const float weight = softmax.weight(lane % 2 ? scalars.x : lane ? before : -INFINITY, both);
    Partial<1> span;
#pragma unroll
    for (int i = 0; i < kSpanChunks; ++i) {
      if (i >= parts) break;
      span.mix(
          __shfl_sync(kFullMask, weight, 2 * i), __shfl_sync(kFullMask, weight, 2 * i + 1),
          __shfl_sync(kFullMask, scalars.y, 2 * i), &out[i]);
    }
    span.top = __shfl_sync(kFullMask, both, 2 * parts - 2);
    return span;
  }

  // The fold of a row's parts, as decode_combine_kernel does it: a warp takes a slice of a head's spans, and up to 32
  // columns. The slots are free.
  __device__ void fold_row(const Work& row, const Softmax& softmax) const {
    constexpr int kColumns = D / 4, kSlices = kCombineThreads / kColumns;
    constexpr int kTurns = (kColumns + kWarpSize - 1) / kWarpSize;
    static_assert(kStepWarps % kTurns == 0);
    const bool by_chunk = p.part_chunks == 1;
    const int chunks = chunks_of(pages_of(row)), spans = (chunks + kSpanChunks - 1) / kSpanChunks;
    const int in_span = by_chunk ? kSpanChunks : 1, parts = by_chunk ? chunks : spans, slices = min(kSlices, spans);
    const int head_bytes = slices * kColumns * static_cast<int>(sizeof(Partial<1>));
    const int at_a_time = group * head_bytes <= Attend::shared_bytes(D) ? group : Attend::shared_bytes(D) / head_bytes;
    Partial<1>* const folded = reinterpret_cast<Partial<1>*>(memory);  // [at_a_time, slices, kColumns]
#pragma unroll 1
    for (int first_head = 0; first_head < group; first_head += at_a_time) {
      const int heads = min(at_a_time, group - first_head);
#pragma unroll 1
      for (int unit = warp, h = 0, slice = warp / kTurns;; unit += kStepWarps, slice += kStepWarps / kTurns) {
        for (; slice >= slices; slice -= slices) ++h;
        if (h >= heads) break;
        const int column = unit % kTurns * kWarpSize + lane;
        const int64_t at = int64_t{row.row} * p.most_parts * group + first_head + h;
        Partial<1> total;
#pragma unroll 1
        for (int span = slice; span < spans; span += slices) {
          const int first = span * in_span;
          total.fold(
              fold_span(p.sums + at, p.outs + at * D, first, min(in_span, parts - first), column, softmax), softmax);
        }
        if (column < kColumns) folded[(h * slices + slice) * kColumns + column] = total;
      }
      __syncthreads();
#pragma unroll 1
      for (int i = threadIdx.x; i < heads * kColumns; i += kStepThreads) {
        const int column = i % kColumns, h = i / kColumns;
        Partial<1> total = folded[h * slices * kColumns + column];
#pragma unroll 1
        for (int s = 1; s < slices; ++s) total.fold(folded[(h * slices + s) * kColumns + column], softmax);
        const int64_t q = int64_t{row.b} * p.size.Hq + row.head * group + first_head + h;
        total.write(static_cast<T*>(p.out) + q * D + column * 4, 0);
        if (column == 0) p.lse[q] = total.lse(softmax);
      }
      __syncthreads();
    }
  }

  __device__ void attend_rows() {
    const Softmax softmax(p.scale);
    Attend tokens(D, shared.attend, memory);
    for (;;) {
      const Work at = shared.run;
      if (at.row < 0) return;
      int next = 0;
      if (is_second()) next = atomicAdd(&p.progress->runs, 1);
      if (is_first()) wait_for(&progress_of(at).listed, 1);
      __syncthreads();
      const int first_chunk = at.i * run_chunks, chunks = min(run_chunks, chunks_of(pages_of(at)) - first_chunk);
      const int first = first_chunk * kChunkTokens, own = first + warp * Attend::kTokens + lane % Attend::kTokens;
      typename Merge::Chunk partial;
      attend_chunks(
          tokens, softmax, p.append.k_cache, p.append.v_cache, query_of(at), D, first, first + chunks * kChunkTokens,
          p.paging.page_size(), shared.results, shared.attend, [&](int offset) { return find_token(at, own + offset); },
          [&](int chunk, const typename Merge::Chunk& merged) {
            if (p.part_chunks == 1)
              store_part(at.row, first_chunk + chunk, merged);
            else
              partial.fold(merged, softmax);
          });
      if (p.part_chunks > 1) {
        store_part(at.row, at.i, partial);
        __syncthreads();
      }
      if (is_first()) shared.last = add_acquire_release(&progress_of(at).attended, 1) == at.count - 1;
      if (is_second()) describe_run(next);
      __syncthreads();
      if (shared.last) fold_row(at, softmax);
    }
  }

  __device__ void run() {
    wait_for_previous_kernel();
    int item = 0;
    if (is_first()) item = atomicAdd(&p.progress->stretches, 1);
    if (is_second()) item = atomicAdd(&p.progress->runs, 1);
    if (is_third()) shared.list = atomicAdd(&p.progress->lists, 1);
    if (is_fourth()) shared.place = atomicAdd(&p.progress->blocks, 1);
    plan();
    if (is_first()) describe_stretch(item);
    if (is_second()) describe_run(item);
    __syncthreads();
    score_rows();
    make_lists();
    renew_rows(gridDim.x - 1 - shared.place);
    start_next_kernel();
    attend_rows();
  }
};

template <class T, class Bound, int D>
__global__ void __launch_bounds__(kStepThreads, D <= 128 ? 2 : 1) decode_step_kernel(const StepParams p) {
  extern __shared__ __align__(16) std::byte memory[];
  __shared__ typename StepBlock<T, Bound, D>::Shared shared;
  StepBlock<T, Bound, D> block{.p = p, .shared = shared, .memory = memory};
  block.run();
}

}  // namespace quest::cuda
