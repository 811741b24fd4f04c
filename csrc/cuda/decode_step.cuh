// decode_step: append, estimate, selection and attention of one new token by one launch.
//
// A row is a sequence and KV head. The work is cut by the lengths as they are into short stretches of pages to score
// and about as many runs of chunks to attend to as there are blocks. Blocks take them as they get to them: first
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
#include "run_list.cuh"
#include "step_plan.cuh"

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
struct StepBlock : StepPlan {
  using Attend = MmaAttend<T, D>;
  using Merge = ChunkMerge<Attend>;
  using Parts = RowParts<T, D>;
  static_assert(Attend::kThreads == kStepThreads && kCombineThreads == kStepThreads);
  static_assert(Parts::shared_bytes(kMmaHeads) <= Attend::shared_bytes(D));
  static constexpr bool kBytes = sizeof(Bound) == 1;
  using BoundsSlot = RowSlot<D * sizeof(Bound), ReadBy::row>;

  static constexpr int kAhead = kBytes ? 2 : 1;  // tiles whose bounds are on their way while one is scored

  using List = RunList<Attend::shared_bytes(D)>;
  struct Shared {
    typename List::Shared list;  // at the front, where RunList looks for it
    typename StepPlan::Shared plan;
    int last;
    float scales[kAhead + 1][kStepWarps][kMmaRows];
    WarpResults<kStepWarps> results;
    typename Attend::Shared attend;
  };

  // Dynamic shared memory: the slots, and then `shared`.
  static constexpr int kSharedAt = Attend::shared_bytes(D), kSharedBytes = kSharedAt + static_cast<int>(sizeof(Shared));

  Shared& shared;
  std::byte* const memory;
  const int group = p.size.group();

  __device__ StepBlock(const StepParams& params, std::byte* dynamic)
      : StepPlan(params, reinterpret_cast<Shared*>(dynamic + kSharedAt)->plan),
        shared(*reinterpret_cast<Shared*>(dynamic + kSharedAt)),
        memory(dynamic) {}

  __device__ QueryTile<T> query_of(const Work& at) const {
    return {
        static_cast<const T*>(p.q.data) + at.b * p.q.stride_b + at.head * group * p.q.stride_h, p.q.stride_h, group,
        at.head};
  }
  __device__ RowProgress& progress_of(const Work& at) const { return p.progress->rows[at.row]; }
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
    const uint32_t key = mine >= n ? kNoKey : candidate ? sort_key(broken ? NAN : score) : kForcedKey;
    uint32_t* const keys = p.keys + (at.b * p.size.Hkv + score_head(at)) * p.keys_stride;
    if (first < n && List::in_groups(n, p.K)) {
      if (c < 2) keys[mine] = key;
      const uint32_t best = __reduce_max_sync(kFullMask, c < 2 ? key : kNoKey);
      if (lane == 0) keys[key_room(p.paging.P) + List::key_place(first / kGroupPages, groups_of(n))] = best;
    } else if (c < 2 && mine < n) {
      keys[List::key_place(mine, n)] = key;
    }
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
    const int start = planned.starts[work.b], head = score_head(work);
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
    const int slot = planned.starts[work.b] & (p.paging.page_size() - 1), head = score_head(work);
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
    for (int turn = 0;; turn ^= 1) {
      const Work at = planned.stretches[turn];
      if (at.row < 0) return;
      int next = 0;
      if (is_second()) next = atomicAdd(&p.progress->stretches, 1);
      score_stretch(at);
      if (is_second()) describe_stretch(next, turn ^ 1);
      __syncthreads();
      if (is_first()) add_release(&progress_of(at).scored, 1);
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
    const int start = planned.starts[b], page = p.paging.physical(b, start >> p.paging.page_shift);
    if (start >= planned.lengths[b] || page < 0) return;
    const T* const fresh =
        static_cast<const T*>(p.append.k.data) + b * p.append.k.stride_b + head * p.append.k.stride_h;
    renew_bounds(p.append.k_cache, p.append.k_bounds, page, head, (start & (p.paging.page_size() - 1)) + 1, fresh);
  }

  // -------------------------------------------------------------------------------------------------------- attention

  // A run's entries of its row's list, to shared memory and to device memory.
  __device__ void list_pages(const Work& at, int first, int end) {
    const int n = pages_of(at);
    const bool scored = is_scored(n), last = at.i == at.count - 1;
    List run{
        p.keys + at.row * p.keys_stride,
        p.pages + int64_t{at.row} * p.K,
        p.paging.page_table + at.b * p.paging.page_table_stride,
        n,
        p.K,
        p.sink_pages,
        p.recent_pages,
        first,
        end,
        p.paging.P,
        p.paging.N,
        p.paging.page_shift,
        at.length};
    if (scored) run.fetch_table();
    // Where nothing was scored there is only the new token to wait for, in the last page.
    if (scored || last) {
      const int first_scored = at.row - (at.head & (score_heads() - 1));
      if (is_first()) wait_for(&p.progress->rows[first_scored].scored, stretches_of(n));
      __syncthreads();
    }
    if (scored) {
      List::select(run);
    } else {
#pragma unroll 1
      for (int i = first + threadIdx.x; i < (last ? p.K : end); i += kStepThreads) {
        if (i < n)
          run.put(i, n > p.K && i >= p.sink_pages ? n - p.K + i : i);
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
    const ListedPage page = shared.list.pages[entry];
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
    for (int turn = 0;; turn ^= 1) {
      const Work& at = planned.runs[turn];
      if (at.row < 0 && at.i * kStepWarps >= p.size.B * p.size.Hkv) return;
      int next = 0;
      if (is_second()) next = atomicAdd(&p.progress->runs, 1);
      if (at.row < 0) {
        renew_rows(at.i);
        __syncthreads();
        if (is_second()) describe_run(next, turn ^ 1);
        __syncthreads();
        continue;
      }
      const int run_chunks = planned.run_chunks;
      const int entries = min(pages_of(at), p.K), first_chunk = at.i * run_chunks;
      const int chunks = min(run_chunks, chunks_of(pages_of(at)) - first_chunk),
                first_token = first_chunk * kChunkTokens;
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
      if (is_second()) describe_run(next, turn ^ 1);
      __syncthreads();
      if (shared.last) {
        const int spans = (chunks_of(pages_of(at)) + kSpanChunks - 1) / kSpanChunks;
        const int64_t first_part = int64_t{at.row} * p.most_parts * group,
                      q = int64_t{at.b} * p.size.Hq + at.head * group;
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
    cut();
    score_rows();
    start_next_kernel();
    attend_rows();
  }
};

template <class T, class Bound, int D>
__global__ void __launch_bounds__(kStepThreads, D <= 128 ? 2 : 1) decode_step_kernel(const StepParams p) {
  extern __shared__ __align__(16) std::byte memory[];
  StepBlock<T, Bound, D>(p, memory).run();
}

}  // namespace quest::cuda
