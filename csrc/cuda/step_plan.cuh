// How decode_step's work is cut, and what a block has taken of it.
#pragma once

#include "softmax.cuh"
#include "step_params.cuh"

namespace quest::cuda {

// A stretch or run that the block has taken; past the last, row is -1 and i counts on from zero.
struct Work {
  int row, b, head, i, count;  // the i-th of `count` of the row, or of the rows from it on
  int length;                  // of the sequence, with the new token
};

// Stretches are short, so that blocks that memory serves sooner score more of them.
constexpr int kMostStretchTiles = 2;

struct StepPlan {
  struct Shared {
    int lengths[kMostSequences], starts[kMostSequences];  // with the new token, and before it
    int ends[2][kMostSequences];                          // of the stretches, of the runs: of all sequences up to this
    int2 sums[kStepWarps];
    int2 taken;                  // the first stretch and run
    int run_chunks;              // at most; not in a register, as the kernel has none to spare
    Work stretches[2], runs[2];  // the one at hand, and the next
  };

  const StepParams& p;
  Shared& planned;
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  int stretch_tiles;  // at most

  __device__ StepPlan(const StepParams& params, Shared& shared) : p(params), planned(shared) {}

  __device__ int pages_of(const Work& at) const { return p.paging.pages_of(at.length); }
  __device__ int tile_pages() const { return kStepWarps * kMmaRows >> p.score_shift; }
  __device__ int score_heads() const { return 1 << p.score_shift; }
  __device__ int score_groups() const { return p.size.Hkv >> p.score_shift; }
  __device__ int tiles_of(int pages) const {
    return is_scored(pages) ? (((pages + kMmaRows - 1) / kMmaRows << p.score_shift) + kStepWarps - 1) / kStepWarps : 1;
  }
  __device__ int stretches_of(int pages) const { return (tiles_of(pages) + stretch_tiles - 1) / stretch_tiles; }
  // Whether scores decide anything.
  __device__ bool is_scored(int pages) const { return pages > p.K && p.sink_pages + p.recent_pages < p.K; }

  __device__ int chunks_of(int pages) const {
    return max(1, ((min(pages, p.K) << p.paging.page_shift) + kChunkTokens - 1) / kChunkTokens);
  }

  // The block's first stretch and run; the lengths, how the work is cut, and where in its order each sequence begins,
  // by a thread a sequence.
  __device__ void cut() {
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
      planned.lengths[b] = length, planned.starts[b] = p.append.paging.length(b);
      tiles = tiles_of(pages), chunks = chunks_of(pages);
    }
    const int2 all = sum(tiles * score_groups(), chunks * p.size.Hkv, kWarpSize);
    const int blocks = gridDim.x;
    stretch_tiles = min((all.x + blocks - 1) / blocks, kMostStretchTiles);
    const int parts = p.part_chunks * blocks;
    const int run_chunks =
        min((all.y + parts - 1) / parts * p.part_chunks, (kMostListed << p.paging.page_shift) / kChunkTokens);
    const int2 ends =
        sum(score_groups() * ((tiles + stretch_tiles - 1) / stretch_tiles),
            p.size.Hkv * ((chunks + run_chunks - 1) / run_chunks), warp + 1);
    if (b < p.size.B) planned.ends[0][b] = ends.x, planned.ends[1][b] = ends.y;
    if (is_first()) planned.taken = taken, planned.run_chunks = run_chunks;
    __syncthreads();
    if (is_first()) describe_stretch(planned.taken.x, 0);
    if (is_second()) describe_run(planned.taken.y, 0);
    __syncthreads();
  }
  // The sums over the threads up to this one, or over all of so many warps if that is more. Threads past the sequences
  // have zeros.
  __device__ int2 sum(int x, int y, int warps) const {
    if (p.size.B == 1) {
      // Thread 0 alone has something.
      if (warps < kWarpSize) return {x, y};
      if (threadIdx.x == 0) planned.sums[0] = {x, y};
      __syncthreads();
      return planned.sums[0];
    }
#pragma unroll
    for (int step = 1; step < kWarpSize; step *= 2) {
      const int a = __shfl_up_sync(kFullMask, x, step), b = __shfl_up_sync(kFullMask, y, step);
      if (lane >= step) x += a, y += b;
    }
    __syncthreads();
    if (lane == kWarpSize - 1) planned.sums[warp] = {x, y};
    __syncthreads();
    const bool all = warps == kWarpSize;
    if (all) x = y = 0;
#pragma unroll 1
    for (int w = 0; w < (all ? kStepWarps : warp); ++w) x += planned.sums[w].x, y += planned.sums[w].y;
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
  __device__ void describe_stretch(int item, int turn) const {
    describe(planned.stretches[turn], planned.ends[0], planned.lengths, p.size.B, score_groups(), score_heads(), item);
  }
  __device__ void describe_run(int item, int turn) const {
    describe(planned.runs[turn], planned.ends[1], planned.lengths, p.size.B, p.size.Hkv, 1, item);
  }
  // Threads that do something by themselves, each in a warp of its own.
  __device__ bool is_first() const { return threadIdx.x == 0; }
  __device__ bool is_second() const { return threadIdx.x == kWarpSize; }
};

}  // namespace quest::cuda
