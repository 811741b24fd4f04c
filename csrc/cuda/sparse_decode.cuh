// sparse_decode: attention over the tokens of a list of pages, split over the list and combined.
//
// A block attends to one split of a list. Where splits are few and short, each tile becomes a partial. Otherwise a
// split is a supertile, which its block merges into one partial. The order of merging is the same, so are the bits.
#pragma once

#include "core/ptx.cuh"
#include "tile/attend_loop.cuh"
#include "tile/attend_mma.cuh"
#include "tile/attend_simt.cuh"
#include "tile/combine.cuh"
#include "tile/list_tile.cuh"

namespace quest::cuda {

struct DecodeKernelParams {
  DecodeParams op;
  int32_t splits, split_tiles;  // splits of a list, and tiles in each
  Partials partials;            // used where a list has more than one
};

// The physical page of token i of the list, or kNoToken, or kInvalidPage.
__device__ __forceinline__ int find_token(const DecodeParams& p, const ListTile& tile, int i) {
  const Paging& g = p.paging;
  const int entry = i >> g.page_shift, slot = i & (g.page_size() - 1);
  int page = -1;
  if (entry < p.pages.K) page = p.pages.data ? p.pages.of(tile.b, tile.t, tile.list)[entry] : entry;
  // Looked up before the length is used, so that the two loads wait together.
  const int physical = g.physical(tile.b, page);
  const bool in_table = page >= 0 && page < g.P;
  if (page == -1 || tile.visible == 0 || (in_table && (page << g.page_shift) + slot >= tile.visible)) return kNoToken;
  return physical < 0 ? kInvalidPage : physical;
}

__device__ __forceinline__ int64_t query_index(const DecodeParams& p, int b, int t, int head) {
  return (int64_t{b} * p.size.T + t) * p.size.Hq + head;
}

template <class Attend>
__global__ void __launch_bounds__(Attend::kThreads, Attend::kMaxD <= 128 ? 2 : 1)
    decode_kernel(const DecodeKernelParams params) {
  using T = typename Attend::Element;
  using Merge = WarpMerge<Attend>;
  extern __shared__ __align__(16) std::byte memory[];
  __shared__ WarpStates<Attend::kWarps> warps;
  __shared__ typename Attend::Shared shared;
  const DecodeParams& p = params.op;
  const int warp = threadIdx.x / kWarpSize, D = p.size.D, page_size = p.paging.page_size();
  const int head = Merge::head();

  ListTile tile(params);
  wait_for_previous_kernel();
  tile.read_length(p);
  const int list_tokens = p.pages.data ? p.pages.K << p.paging.page_shift : tile.visible;
  const int first_token = tile.split * params.split_tiles * kTileTokens;
  const int end_token = min(first_token + params.split_tiles * kTileTokens, list_tokens);
  const bool one_partial = params.partials.count == 1;
  if (first_token >= end_token && !one_partial) return;  // the combine kernel does not read this partial either

  const Softmax softmax(p.scale);
  const QueryTile<T> query{
      .data = static_cast<const T*>(p.q.data) + tile.b * p.q.stride_b + tile.t * p.q.stride_t +
              tile.first_head * p.q.stride_h,
      .stride = p.q.stride_h,
      .heads = tile.heads,
      .kv_head = tile.kv_head};
  const int own_token = first_token + warp * Attend::kTokens + threadIdx.x % Attend::kTokens;
  const int64_t row = query_index(p, tile.b, tile.t, tile.first_head + head);
  const auto store = [&](int partial, const typename Merge::State& state) {
    if (Merge::first_vec() == 0) params.partials.store(row, partial, state.max, state.sum);
#pragma unroll
    for (int i = 0; i < Merge::kVecs; ++i) {
      const int vec = Merge::first_vec() + i * Merge::kHeadThreads;
      if (vec * 4 < D) params.partials.store(row, partial, D, vec, state.out[i]);
    }
  };
  Attend attend(D, shared, memory);
  typename Merge::State merged;
  const bool store_tiles = params.partials.tiles == 1 && !one_partial;
  attend_tiles(
      attend, softmax, p.k_cache, p.v_cache, query, D, first_token, end_token, page_size, warps, shared,
      [&](int offset) { return find_token(p, tile, own_token + offset); },
      [&](int i, const typename Merge::State& state) {
        if (store_tiles)
          store(tile.split * params.split_tiles + i, state);
        else
          merged.merge(state, softmax);
      });
  start_next_kernel();

  if (head >= tile.heads || store_tiles) return;
  if (!one_partial) return store(tile.split, merged);
  if (Merge::first_vec() == 0) p.lse[row] = merged.lse(softmax);
#pragma unroll
  for (int i = 0; i < Merge::kVecs; ++i) {
    const int d = (Merge::first_vec() + i * Merge::kHeadThreads) * 4;
    if (d < D) merged.write(static_cast<T*>(p.out) + row * D + d, i);
  }
}

// A block combines the partials of one query head.
template <class T, int D>
__global__ void __launch_bounds__(kCombineThreads) decode_combine_kernel(const DecodeKernelParams params) {
  __shared__ typename Combine<T, D>::template Shared<1> shared;
  const DecodeParams& p = params.op;
  const int64_t row = blockIdx.x;
  const int token = static_cast<int>(blockIdx.x) / p.size.Hq, t = token % p.size.T, b = token / p.size.T;
  wait_for_previous_kernel();
  const int tokens = p.pages.data ? p.pages.K << p.paging.page_shift : p.paging.visible(b, t, p.size.T);
  const int partial_tokens = kTileTokens * params.partials.tiles;
  Combine<T, D>::template run<1>(
      {.partials = params.partials,
       .first_head = row,
       .heads = 1,
       .count = (tokens + partial_tokens - 1) / partial_tokens,
       .scale = p.scale,
       .out = static_cast<T*>(p.out) + row * D,
       .lse = p.lse + row},
      shared);
  start_next_kernel();
}

}  // namespace quest::cuda
