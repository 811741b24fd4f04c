// sparse_decode: attention over the tokens of a list of pages, split over the list and combined.
//
// A block attends to a run of chunks (softmax.cuh). Where there are few of them it leaves each chunk to the combine
// kernel; else its run is a span, which it folds as it goes: the same arithmetic, so the same bits. What holds no token
// is an exact identity of the fold.
#pragma once

#include "attend_chunk.cuh"
#include "launch_order.cuh"

namespace quest::cuda {

// The block's place: one list of pages, a tile of the query heads that share it, one run of the list's chunks. Blocks
// of the same run are neighbours: a page's heads lie together, and memory is faster where neighbours are read together.
struct DecodeTile {
  int run, b, t, list, first_head, heads, kv_head, visible;
  __device__ explicit DecodeTile(const DecodeParams& p) {
    const int share = p.size.Hq / p.Hs, tiles = (share + kMmaHeads - 1) / kMmaHeads;
    int i = blockIdx.x;
    const int tile = i % tiles;
    i /= tiles;
    list = i % p.Hs, i /= p.Hs;
    run = i % p.runs, i /= p.runs;
    t = i % p.size.T;
    b = i / p.size.T;
    first_head = list * share + tile * kMmaHeads;
    heads = min(kMmaHeads, share - tile * kMmaHeads);
    kv_head = first_head / p.size.group();
  }
  __device__ void read_length(const DecodeParams& p) { visible = p.paging.visible(b, t, p.size.T); }
};

// The physical page of token i of the list, or kNoToken, or kBrokenPage.
__device__ __forceinline__ int find_token(const DecodeParams& p, const DecodeTile& tile, int i) {
  const Paging& g = p.paging;
  const int entry = i >> g.page_shift, slot = i & (g.page_size() - 1);
  int page = -1;
  if (entry < p.K)
    page = p.pages
               ? p.pages[tile.b * p.pages_stride_b + tile.t * p.pages_stride_t + tile.list * p.pages_stride_h + entry]
               : entry;
  // Looked up before the length is asked about: the two loads then wait together.
  const int physical = g.physical(tile.b, page);
  const bool in_table = page >= 0 && page < g.P;
  if (page == -1 || tile.visible == 0 || (in_table && (page << g.page_shift) + slot >= tile.visible)) return kNoToken;
  return physical < 0 ? kBrokenPage : physical;
}

__device__ __forceinline__ int64_t query_index(const DecodeParams& p, int b, int t, int head) {
  return (int64_t{b} * p.size.T + t) * p.size.Hq + head;
}

template <class Attend>
__global__ void __launch_bounds__(Attend::kThreads, Attend::kMaxD <= 128 ? 2 : 1) decode_kernel(const DecodeParams p) {
  using T = typename Attend::Element;
  using Merge = ChunkMerge<Attend>;
  extern __shared__ __align__(16) std::byte memory[];
  __shared__ WarpResults<Attend::kWarps> results;
  __shared__ typename Attend::Shared shared;
  const int warp = threadIdx.x / kWarpSize, D = p.size.D, page_size = p.paging.page_size();
  const int head = Merge::head();

  DecodeTile tile(p);
  wait_for_previous_kernel();
  tile.read_length(p);
  const int list_tokens = p.pages ? p.K << p.paging.page_shift : tile.visible;
  const int first_token = tile.run * p.run_chunks * kChunkTokens;
  const int end_token = min(first_token + p.run_chunks * kChunkTokens, list_tokens);
  if (first_token >= end_token && p.parts > 1) return;  // the combine kernel does not look there either

  const Softmax softmax(p.scale);
  const QueryTile<T> query{
      static_cast<const T*>(p.q.data) + tile.b * p.q.stride_b + tile.t * p.q.stride_t + tile.first_head * p.q.stride_h,
      p.q.stride_h, tile.heads, tile.kv_head};
  const int own_token = first_token + warp * Attend::kTokens + threadIdx.x % Attend::kTokens;
  const int64_t row = query_index(p, tile.b, tile.t, tile.first_head + head);
  const auto store = [&](int part, const typename Merge::Chunk& result) {
    const int64_t at = row * p.parts + part;
    if (Merge::first_column() == 0) p.partial_max[at] = result.top, p.partial_sum[at] = result.sum;
#pragma unroll
    for (int i = 0; i < Merge::kColumns; ++i) {
      const int d = (Merge::first_column() + i * Merge::kHeadThreads) * 4;
      if (d < D) *reinterpret_cast<float4*>(p.partial_out + at * D + d) = result.out[i];
    }
  };
  Attend tokens(D, shared, memory);
  typename Merge::Chunk partial;
  attend_chunks(
      tokens, softmax, p.k_cache, p.v_cache, query, D, first_token, end_token, page_size, results, shared,
      [&](int offset) { return find_token(p, tile, own_token + offset); },
      [&](int chunk, const typename Merge::Chunk& merged) {
        if (p.part_chunks == 1 && p.parts > 1)
          store(tile.run * p.run_chunks + chunk, merged);
        else
          partial.fold(merged, softmax);
      });
  start_next_kernel();

  if (head >= tile.heads || (p.part_chunks == 1 && p.parts > 1)) return;
  if (p.parts > 1) return store(tile.run, partial);
  if (Merge::first_column() == 0) p.lse[row] = partial.lse(softmax);
#pragma unroll
  for (int i = 0; i < Merge::kColumns; ++i) {
    const int d = (Merge::first_column() + i * Merge::kHeadThreads) * 4;
    if (d < D) partial.write(static_cast<T*>(p.out) + row * D + d, i);
  }
}

// A block folds the parts of one query head. Threads are vectors of four head dimensions x slices.
template <class T, int kPartsInSpan>
__global__ void __launch_bounds__(kCombineThreads) decode_combine_kernel(const DecodeParams p) {
  __shared__ Partial<1> shared[kCombineThreads];
  const int D = p.size.D, columns = D / 4, slices = combine_slices(D);
  const int column = threadIdx.x % columns, slice = threadIdx.x / columns;
  const int64_t row = blockIdx.x;
  const int token = static_cast<int>(blockIdx.x) / p.size.Hq, t = token % p.size.T, b = token / p.size.T;
  wait_for_previous_kernel();
  const int tokens = p.pages ? p.K << p.paging.page_shift : p.paging.visible(b, t, p.size.T);
  constexpr int kPartTokens = kChunkTokens * kSpanChunks / kPartsInSpan;
  const int parts = (tokens + kPartTokens - 1) / kPartTokens;
  const auto load = [&](int i) {
    // Without a branch, so that the loads wait together.
    Partial<1> part;
    const int64_t at = row * p.parts + max(0, min(i, parts - 1));
    part.top = p.partial_max[at], part.sum = p.partial_sum[at];
    part.out[0] = *reinterpret_cast<const float4*>(p.partial_out + at * D + column * 4);
    if (i >= parts) part = {};
    return part;
  };

  const Softmax softmax(p.scale);
  Partial<1> total;
  if (slice < slices) total = fold_slice<kPartsInSpan>(slice, slices, parts, softmax, load);
  shared[threadIdx.x] = total;
  __syncthreads();
  start_next_kernel();
  if (slice != 0) return;
  for (int s = 1; s < slices; ++s) total.fold(shared[s * columns + column], softmax);
  total.write(static_cast<T*>(p.out) + row * D + column * 4, 0);
  if (column == 0) p.lse[row] = total.lse(softmax);
}

}  // namespace quest::cuda
