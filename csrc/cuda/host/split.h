// The split of attention: how many tiles a block takes of a list, and how many of them merge before they are stored.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../tile/softmax_state.cuh"

namespace quest::cuda {

// Where the supertiles of all lists keep the GPU busy, a split is a supertile and one partial. Else it is a few tiles,
// as many as give each of `blocks` resident blocks work, and each tile is a partial.
struct SplitPlan {
  int32_t splits, split_tiles;      // of a list
  int32_t partials, partial_tiles;  // of a list
  // The tiles of all lists whose supertiles keep the blocks busy.
  static int64_t large_tiles(int64_t blocks) { return blocks * 9 / 10 * kSupertile; }
  SplitPlan(int64_t lists, int64_t tiles, int64_t blocks) {
    const int64_t supertiles = (tiles + kSupertile - 1) / kSupertile;
    const bool large = lists * supertiles * kSupertile >= large_tiles(blocks);
    const int64_t split = large ? kSupertile : std::max<int64_t>(1, (lists * tiles + blocks - 1) / blocks);
    split_tiles = static_cast<int32_t>(split), splits = static_cast<int32_t>((tiles + split - 1) / split);
    partial_tiles = large ? kSupertile : 1, partials = static_cast<int32_t>(large ? supertiles : tiles);
  }
};

}  // namespace quest::cuda
