// sparse_decode: attention over the tokens of a list of pages, split over the list and combined.
//
// Small calls give every chunk (softmax.cuh) a block of its own and leave the folding to the combine kernel; large ones
// give a block a whole span, which it folds as it goes: the same arithmetic, so the same bits. What holds no token is
// an exact identity of the fold.
#pragma once

#include "attend_chunk.cuh"
#include "launch_order.cuh"

namespace quest::cuda {

// The block's place: one list of pages, a tile of the query heads that share it, one part (chunk or span) of the list.
struct DecodeTile {
  int part, b, t, list, first_head, heads, kv_head, visible;
  __device__ explicit DecodeTile(const DecodeParams& p) {
    const int share = p.size.Hq / p.Hs, tiles = (share + kMmaHeads - 1) / kMmaHeads;
    int i = blockIdx.x;
    part = i % p.parts, i /= p.parts;
    const int tile = i % tiles;
    i /= tiles;
    list = i % p.Hs, i /= p.Hs;
    t = i % p.size.T;
    b = i / p.size.T;
    first_head = list * share + tile * kMmaHeads;
    heads = min(kMmaHeads, share - tile * kMmaHeads);
    kv_head = first_head / p.size.group();
    visible = p.paging.visible(b, t, p.size.T);
  }
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
  extern __shared__ __align__(16) float warp_out[];  // [kWarps, heads, D]
  __shared__ WarpResults<Attend::kWarps> results;
  __shared__ typename Attend::Shared shared;
  const int warp = threadIdx.x / kWarpSize, D = p.size.D, page_size = p.paging.page_size();
  const int head = Merge::head();

  wait_for_previous_kernel();
  const DecodeTile tile(p);
  const int list_tokens = p.pages ? p.K << p.paging.page_shift : tile.visible;
  const int first_token = tile.part * p.part_chunks * kChunkTokens;
  const int end_token = min(first_token + p.part_chunks * kChunkTokens, list_tokens);
  if (first_token >= end_token && p.parts > 1) return;  // the combine kernel does not look there either

  const Softmax softmax(p.scale);
  const QueryTile<T> query{
      static_cast<const T*>(p.q.data) + tile.b * p.q.stride_b + tile.t * p.q.stride_t + tile.first_head * p.q.stride_h,
      p.q.stride_h, tile.heads, tile.kv_head};
  const int warp_token = first_token + warp * Attend::kTokens, own_token = threadIdx.x % Attend::kTokens;
  const auto find = [&](int offset) { return find_token(p, tile, warp_token + offset + own_token); };
  const auto prefetch = [&](int page, int offset) {
    Attend::prefetch(p.k_cache, p.v_cache, query, page, warp_token + offset, page_size);
  };

  // A chunk is in registers, the next one on its way to the L2 cache.
  typename Merge::Chunk partial;
  int page = find(0);
  Attend tokens(query, D, shared);
  tokens.load(p.k_cache, p.v_cache, query, page, warp_token, page_size);
  const bool many = first_token + kChunkTokens < end_token;
  int next = many ? find(kChunkTokens) : kNoToken;
  prefetch(next, kChunkTokens);
  for (int offset = 0; first_token + offset < end_token; offset += kChunkTokens) {
    const int left = end_token - first_token - offset;
    const bool any = __syncthreads_or(page != kNoToken);
    page = next;
    if (left > 2 * kChunkTokens) next = find(offset + 2 * kChunkTokens);
    if (any)
      tokens.attend(
          softmax, p.k_cache, p.v_cache, query, warp_out + warp * tile.heads * D, results.max[warp], results.sum[warp],
          shared);
    if (left > kChunkTokens)
      tokens.load(p.k_cache, p.v_cache, query, page, warp_token + offset + kChunkTokens, page_size);
    if (left > 2 * kChunkTokens) prefetch(next, offset + 2 * kChunkTokens);
    __syncthreads();
    if (any && head < tile.heads) partial.fold(Merge::merge(softmax, results, warp_out, tile.heads, D), softmax);
  }
  start_next_kernel();

  if (head >= tile.heads) return;
  const int64_t row = query_index(p, tile.b, tile.t, tile.first_head + head);
  const int64_t part = row * p.parts + tile.part;
  if (Merge::first_column() == 0) {
    if (p.parts == 1)
      p.lse[row] = partial.lse(softmax);
    else
      p.partial_max[part] = partial.top, p.partial_sum[part] = partial.sum;
  }
#pragma unroll
  for (int i = 0; i < Merge::kColumns; ++i) {
    const int d = (Merge::first_column() + i * Merge::kHeadThreads) * 4;
    if (d >= D) continue;
    if (p.parts == 1)
      partial.write(static_cast<T*>(p.out) + row * D + d, i);
    else
      *reinterpret_cast<float4*>(p.partial_out + part * D + d) = partial.out[i];
  }
}

// A block folds the parts of one query head. Threads are vectors of four head dimensions x slices.
template <class T, int kPartsInSpan>
__global__ void __launch_bounds__(kCombineThreads) decode_combine_kernel(const DecodeParams p) {
  __shared__ Partial<1> shared[kCombineThreads];
  const int D = p.size.D, columns = D / 4, slices = combine_slices(D);
  const int column = threadIdx.x % columns, slice = threadIdx.x / columns;
  const int64_t row = blockIdx.x;

  wait_for_previous_kernel();
  const int t = row / p.size.Hq % p.size.T, b = row / p.size.Hq / p.size.T;
  const int tokens = p.pages ? p.K << p.paging.page_shift : p.paging.visible(b, t, p.size.T);
  constexpr int kPartTokens = kChunkTokens * kSpanChunks / kPartsInSpan;
  const int parts = (tokens + kPartTokens - 1) / kPartTokens;
  const auto load = [&](int i) {
    Partial<1> part;
    if (i < parts) {
      const int64_t at = row * p.parts + i;
      part.top = p.partial_max[at], part.sum = p.partial_sum[at];
      part.out[0] = *reinterpret_cast<const float4*>(p.partial_out + at * D + column * 4);
    }
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
