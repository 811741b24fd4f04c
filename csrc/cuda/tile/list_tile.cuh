// The place of a block of sparse_decode or rerank_pages.
#pragma once

#include "attend.cuh"

namespace quest::cuda {

// A block's place: a list of pages, a tile of the query heads that share it, and a split of the list. Blocks of the
// same split are neighbours, because the heads of a page lie together in memory.
struct ListTile {
  int split, b, t, list, first_head, heads, kv_head, visible;
  template <class KernelParams>
  __device__ explicit ListTile(const KernelParams& params) {
    const auto& p = params.op;
    const int share = p.size.Hq / p.pages.Hs, tiles = (share + kHeadTile - 1) / kHeadTile;
    int i = blockIdx.x;
    const int tile = i % tiles;
    i /= tiles;
    list = i % p.pages.Hs, i /= p.pages.Hs;
    split = i % params.splits, i /= params.splits;
    t = i % p.size.T;
    b = i / p.size.T;
    first_head = list * share + tile * kHeadTile;
    heads = min(kHeadTile, share - tile * kHeadTile);
    kv_head = first_head / p.size.group();
  }
  template <class Params>
  __device__ void read_length(const Params& p) {
    visible = p.paging.visible(b, t, p.size.T);
  }
};

}  // namespace quest::cuda
