// decode_step: append, estimate, selection and attention of one new token by one launch.
//
// A row is a sequence and KV head. The work is cut into stretches of pages to score and runs of chunks to attend to, by
// the lengths as they are, about as many of each as there are blocks. Blocks take them as they get to them: first
// stretches, then runs. A run waits for its row's stretches; then its block selects the row's pages, as the blocks of
// the row's other runs do for themselves, for what one told the others would reach them no earlier. The block that is
// done last with a row's runs folds what they left. Work is only ever taken by a block that runs, and waits only for
// work of the kind before: however few blocks there are at a time, all comes to an end.
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
#include "fold_parts.cuh"
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
  return c & 1 ? reduced[1] : reduced[0];
}

template <class T, class Bound, int D>
struct StepBlock {
  using Attend = MmaAttend<T, D>;
  using Merge = ChunkMerge<Attend>;
  using Parts = RowParts<T, D>;
  static_assert(Attend::kThreads == kStepThreads && kCombineThreads == kStepThreads);
  static_assert(Parts::shared_bytes(kMmaHeads) <= Attend::shared_bytes(D));
  static constexpr bool kBytes = sizeof(Bound) == 1;
  using BoundsSlot = RowSlot<D * sizeof(Bound), ReadBy::row>;

  // Times four keys that a thread has room for.
  static constexpr int kNearFours = Attend::shared_bytes(D) / int{sizeof(uint4)} / kStepThreads;
  static constexpr int kAhead = kBytes ? 2 : 1;  // tiles whose bounds are on their way while one is scored

  // A stretch or run that the block has taken; past the last, row is -1 and i counts on from zero.
  struct Work {
    int row, b, head, i, count;  // the i-th of `count` of the row, or of the rows from it on
    int length;                  // of the sequence, with the new token
  };
  struct Shared {
    int lengths[kMostSequences], starts[kMostSequences];  // with the new token, and before it
    int ends[2][kMostSequences];                          // of the stretches, of the runs: of all sequences up to this
    int2 sums[kStepWarps];
    int2 taken;      // the first stretch and run
    Work stretch, run;
    int last;
    float scales[kAhead + 1][kStepWarps][kMmaRows];
    union {
      SelectShared<kStepThreads> select;
      WarpResults<kStepWarps> results;
    };
    ListedPage list[kMostListed];  // of the run
    typename Attend::Shared attend;
  };

  // Dynamic shared memory: the slots, and then `shared`.
  static constexpr int kSharedAt = Attend::shared_bytes(D), kSharedBytes = kSharedAt + static_cast<int>(sizeof(Shared));

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

  // The block's first stretch and run; the lengths, how the work is cut, and where in its order each sequence begins, by
  // a thread a sequence.
  __device__ void plan() {
    int2 taken{};
    if (is_first()) {
      const uint64_t both = atomicAdd(reinterpret_cast<unsigned long long*>(p.progress), (1ull << 32) + 1);
      taken = {static_cast<int>(both), static_cast<int>(both >> 32)};
    }
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
    const int parts = p.part_chunks * blocks;
    run_chunks = min((all.y + parts - 1) / parts * p.part_chunks, (kMostListed << p.paging.page_shift) / kChunkTokens);
    const int2 ends =
        sum(score_groups() * ((tiles + stretch_tiles - 1) / stretch_tiles),
            p.size.Hkv * ((chunks + run_chunks - 1) / run_chunks), warp + 1);
    if (b < p.size.B) shared.ends[0][b] = ends.x, shared.ends[1][b] = ends.y;
    if (is_first()) shared.taken = taken;
    __syncthreads();
    if (is_first()) describe_stretch(shared.taken.x);
    if (is_second()) describe_run(shared.taken.y);
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
    at.row = -1, at.i = item - ends[sequences - 1];
    if (at.i < 0) {
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

  // Where the key of a page is, of n: threads that select read each four of the keys that they own side by side.
  static __device__ int key_place(int page, int n) {
    const int four = page / kLaneKeys, fours = own_fours<kStepThreads>(n), thread = four / fours;
    return ((four - thread * fours) * kStepThreads + thread) * kLaneKeys + page % kLaneKeys;
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
      p.keys[(at.b * p.size.Hkv + score_head(at)) * p.keys_stride + key_place(mine, n)] =
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

  static __device__ __noinline__ void renew_bounds(
      Cache cache, Bounds bounds, int page, int head, int tokens, const T* fresh) {
    renew_page_bounds_by_warp<T, Bound, D>(cache, bounds, page, head, tokens, fresh);
  }

  // The bounds of the pages that the new tokens are in, a warp a row. Nobody reads them in this step: they are taken
  // after all runs.
  __device__ void renew_rows(int part) const {
    const int row = part * kStepWarps + warp, b = row / p.size.Hkv, head = row - b * p.size.Hkv;
    if (b >= p.size.B) return;
    const int start = shared.starts[b], page = p.paging.physical(b, start >> p.paging.page_shift);
    if (start >= shared.lengths[b] || page < 0) return;
    const T* const fresh =
        static_cast<const T*>(p.append.k.data) + b * p.append.k.stride_b + head * p.append.k.stride_h;
    renew_bounds(p.append.k_cache, p.append.k_bounds, page, head, (start & (p.paging.page_size() - 1)) + 1, fresh);
  }

  // -------------------------------------------------------------------------------------------------------- attention

  // What is needed of a row to list the entries [first, end) of its K.
  struct RunList {
    const uint32_t* keys;
    int32_t* pages;
    const int32_t* table;
    int n, K, forced, first, end;
    int P, N, page_shift, length;

    __device__ void put(Shared& shared, int place, int page) const {
      const int number = page < P ? table[page] : -1;
      const int tokens = min(1 << page_shift, length - (page << page_shift));
      shared.list[place - first] = {number < 0 || number >= N ? kBrokenPage : number, tokens};
      pages[place] = page;
    }
  };
  // Four keys that there is no room for in shared memory, of which `left` are not past the last.
  static __device__ __noinline__ uint4 load_four(const uint4* keys, int left) {
    uint4 four = __ldcg(keys);
    if (left < 1) four.x = kNoKey;
    if (left < 2) four.y = kNoKey;
    if (left < 3) four.z = kNoKey;
    if (left < 4) four.w = kNoKey;
    return four;
  }

  // The slots are free. A function of its own, so that the registers that it wants are not taken from other parts.
  static __device__ __noinline__ void select_pages(RunList run) {
    extern __shared__ __align__(16) std::byte memory[];
    Shared& shared = *reinterpret_cast<Shared*>(memory + kSharedAt);
    const int fours = own_fours<kStepThreads>(run.n), near = min(fours, kNearFours);
    const uint4* const keys = reinterpret_cast<const uint4*>(run.keys) + threadIdx.x;
    uint4* const own = reinterpret_cast<uint4*>(memory) + threadIdx.x;  // as far as there is room
#pragma unroll 1
    for (int j = 0; j < near; ++j) copy_piece(own + j * kStepThreads, keys + j * kStepThreads);
    end_copies();
    wait_copies<0>();
    // Keys past the last are whatever was there.
    const int left = run.n - fours * kLaneKeys * static_cast<int>(threadIdx.x);
#pragma unroll 1
    for (int i = max(0, left); i < near * kLaneKeys; ++i)
      reinterpret_cast<uint32_t*>(own + i / kLaneKeys * kStepThreads)[i % kLaneKeys] = kNoKey;
    const auto four = [&](int j) {
      return j < kNearFours ? own[j * kStepThreads] : load_four(keys + j * kStepThreads, left - j * kLaneKeys);
    };
    SeenKeys seen;
#pragma unroll 2
    for (int j = 0; j < fours; ++j) seen.see(four(j));
    select_best<kStepThreads>(
        run.n, run.K, run.forced, seen, shared.select, four,
        [&](int place, int page) {
          if (place >= run.first && place < run.end) run.put(shared, place, page);
        });
  }

  // A run's entries of its row's list, to shared memory and to device memory.
  __device__ void list_pages(const Work& at, int first, int end) {
    const int n = pages_of(at);
    const bool scored = is_scored(n), last = at.i == at.count - 1;
    const RunList run{
        p.keys + at.row * p.keys_stride,
        p.pages + int64_t{at.row} * p.K,
        p.paging.page_table + at.b * p.paging.page_table_stride,
        n,
        p.K,
        p.sink_pages + p.recent_pages,
        first,
        end,
        p.paging.P,
        p.paging.N,
        p.paging.page_shift,
        at.length};
    // Where nothing was scored there is only the new token to wait for, in the last page.
    if (scored || last) {
      const int stretches = (tiles_of(n) + stretch_tiles - 1) / stretch_tiles;
      if (is_first()) wait_for(&p.progress->rows[at.row - (at.head & (score_heads() - 1))].scored, stretches);
      __syncthreads();
    }
    if (scored) {
      select_pages(run);
    } else {
#pragma unroll 1
      for (int i = first + threadIdx.x; i < (last ? p.K : end); i += kStepThreads) {
        if (i < n)
          run.put(shared, i, n > p.K && i >= p.sink_pages ? n - p.K + i : i);
        else
          run.pages[i] = -1;
      }
    }
    __syncthreads();
  }

  // This lane's token of the run's list.
  __device__ int find_token(int token, int entries) const {
    const int entry = token >> p.paging.page_shift;
    if (entry >= entries) return kNoToken;
    const ListedPage page = shared.list[entry];
    return (token & (p.paging.page_size() - 1)) < page.tokens ? page.physical : kNoToken;
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

  __device__ void attend_rows() {
    const Softmax softmax(p.scale);
    Attend tokens(D, shared.attend, memory);
    for (;;) {
      const Work at = shared.run;
      if (at.row < 0 && at.i * kStepWarps >= p.size.B * p.size.Hkv) return;
      int next = 0;
      if (is_second()) next = atomicAdd(&p.progress->runs, 1);
      if (at.row < 0) {
        renew_rows(at.i);
        __syncthreads();
        if (is_second()) describe_run(next);
        __syncthreads();
        continue;
      }
      const int entries = min(pages_of(at), p.K), first_chunk = at.i * run_chunks;
      const int chunks = min(run_chunks, chunks_of(pages_of(at)) - first_chunk), first_token = first_chunk * kChunkTokens;
      const int first = first_token >> p.paging.page_shift;
      const int end = min(entries, (first_token + chunks * kChunkTokens) >> p.paging.page_shift);
      list_pages(at, first, end);
      const int own = warp * Attend::kTokens + lane % Attend::kTokens;
      typename Merge::Chunk part;
      attend_chunks(
          tokens, softmax, p.append.k_cache, p.append.v_cache, query_of(at), D, first_token,
          first_token + chunks * kChunkTokens, p.paging.page_size(), shared.results, shared.attend,
          [&](int offset) { return find_token(own + offset, end - first); },
          [&](int chunk, const typename Merge::Chunk& merged) {
            part.fold(merged, softmax);
            if ((chunk + 1) % p.part_chunks != 0 && chunk != chunks - 1) return;
            store_part(at.row, (first_chunk + chunk) / p.part_chunks, part);
            part = {};
          });
      if (is_first()) shared.last = add_acquire_release(&progress_of(at).attended, 1) == at.count - 1;
      if (is_second()) describe_run(next);
      __syncthreads();
      if (shared.last) {
        const int spans = (chunks_of(pages_of(at)) + kSpanChunks - 1) / kSpanChunks;
        const int64_t first_part = int64_t{at.row} * p.most_parts * group, q = int64_t{at.b} * p.size.Hq + at.head * group;
        Parts::fold(
            {.sums = p.sums + first_part,
             .outs = p.outs + first_part * D,
             .parts = p.part_chunks == 1 ? chunks_of(pages_of(at)) : spans,
             .in_span = kSpanChunks / p.part_chunks,
             .heads = group,
             .scale = p.scale,
             .out = static_cast<T*>(p.out) + q * D,
             .lse = p.lse + q});
      }
    }
  }

  __device__ void run() {
    wait_for_previous_kernel();
    plan();
    score_rows();
    start_next_kernel();
    attend_rows();
  }
};

template <class T, class Bound, int D>
__global__ void __launch_bounds__(kStepThreads, D <= 128 ? 2 : 1) decode_step_kernel(const StepParams p) {
  extern __shared__ __align__(16) std::byte memory[];
  using Block = StepBlock<T, Bound, D>;
  Block block{
      .p = p, .shared = *reinterpret_cast<typename Block::Shared*>(memory + Block::kSharedAt), .memory = memory};
  block.run();
}

}  // namespace quest::cuda
