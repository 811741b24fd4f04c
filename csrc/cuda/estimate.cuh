// estimate: scores[b, t, h, p] = q- . lower + q+ . upper of page p.
//
// A block owns a tile of pages of one sequence and KV head. The bounds are read once and meet all T * G query rows of
// the head; the grid covers the capacity P, and blocks past the last page only write -inf.
#pragma once

#include "bounds_tile.cuh"
#include "launch_order.cuh"

namespace quest::cuda {

constexpr int kEstimateWarps = 4;
constexpr int kEstimateThreads = kEstimateWarps * kWarpSize;

struct EstimateTile {
  int b, head, first_page, pages, rows;  // rows: T * G query rows
  __device__ EstimateTile(const EstimateParams& p, int pages_a_tile) {
    const int tiles = (p.paging.P + pages_a_tile - 1) / pages_a_tile;
    first_page = int(blockIdx.x % tiles) * pages_a_tile;
    head = blockIdx.x / tiles % p.size.Hkv;
    b = blockIdx.x / tiles / p.size.Hkv;
    pages = p.paging.pages_of(p.paging.length(b));
    rows = p.size.T * p.size.group();
  }
};

// Query row i of the tile's KV head: new token i / G, head i % G of the group.
template <class T>
__device__ __forceinline__ const T* query_row(const Query& q, const Sizes& n, int b, int kv_head, int i) {
  return static_cast<const T*>(q.data) + b * q.stride_b + i / n.group() * q.stride_t +
         (kv_head * n.group() + i % n.group()) * q.stride_h;
}

__device__ __forceinline__ void write_score(const EstimateParams& p, int b, int kv_head, int i, int page, float score) {
  const int t = i / p.size.group(), h = kv_head * p.size.group() + i % p.size.group();
  const bool seen = page < p.paging.pages_of(p.paging.visible(b, t, p.size.T));
  p.scores[((int64_t{b} * p.size.T + t) * p.size.Hq + h) * p.paging.P + page] = seen ? score : -INFINITY;
}

// The physical page, or -1 where there is none. Where the table is wrong the scores become NaN.
__device__ __forceinline__ int64_t
bounds_page(const EstimateParams& p, const EstimateTile& tile, int page, bool& broken) {
  // Looked up before the length is asked about: the two loads then wait together.
  const int64_t physical = p.paging.physical(tile.b, page);
  broken = physical < 0 && page < tile.pages;
  return page < tile.pages ? physical : -1;
}

constexpr int kMmaEstimatePages = kEstimateWarps * kMmaRows;

template <class T, class Bound, int D>
__global__ void __launch_bounds__(kEstimateThreads) estimate_mma_kernel(const EstimateParams p) {
  wait_for_previous_kernel();
  const EstimateTile tile(p, kMmaEstimatePages);
  const int lane = threadIdx.x % kWarpSize, r = lane / 4, c = lane % 4;
  const int first = tile.first_page + threadIdx.x / kWarpSize * kMmaRows;
  if (first >= p.paging.P) return;

  bool broken[2];
  BoundsTile<T, Bound, D> bounds;
#pragma unroll
  for (int half = 0; half < 2; ++half)
    bounds.load(half, p.k_bounds, bounds_page(p, tile, first + r + half * 8, broken[half]), tile.head);

  for (int i = 0; i < tile.rows; i += kMmaHeads) {
    SplitQuery<T, Bound, D> query;
    query.load(i + r < tile.rows ? query_row<T>(p.q, p.size, tile.b, tile.head, i + r) : nullptr);
    float scores[4];
    bounds.score(scores, query);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int row = i + 2 * c + e % 2, page = first + r + e / 2 * 8;
      if (row < tile.rows && page < p.paging.P)
        write_score(p, tile.b, tile.head, row, page, broken[e / 2] ? NAN : scores[e]);
    }
  }
  start_next_kernel();
}

// Float32, and caches whose strides forbid 16-byte loads: a thread owns a page and eight query rows at a time.
constexpr int kSimtRows = 8;
constexpr int kMaxHeadDim = 256;
constexpr int kSimtBlock = 16;  // divides every head_dim

template <class T, class Bound>
__global__ void __launch_bounds__(kEstimateThreads) estimate_simt_kernel(const EstimateParams p) {
  __shared__ float query[kSimtRows][kMaxHeadDim];
  wait_for_previous_kernel();
  const EstimateTile tile(p, kEstimateThreads);
  const int page = tile.first_page + threadIdx.x, D = p.size.D;
  const Bounds& bounds = p.k_bounds;
  bool broken;
  const int64_t physical = bounds_page(p, tile, page, broken);
  const Bound* const lower =
      static_cast<const Bound*>(bounds.data) + physical * bounds.stride_n + tile.head * bounds.stride_h;
  const Bound* const upper = lower + bounds.stride_c;
  const float scale = sizeof(Bound) == 1 && physical >= 0
                          ? bounds.scales[physical * bounds.scales_stride_n + tile.head * bounds.scales_stride_h]
                          : 1.f;

  for (int i = 0; i < tile.rows; i += kSimtRows) {
    __syncthreads();
    for (int x = threadIdx.x; x < kSimtRows * D; x += kEstimateThreads)
      query[x / D][x % D] =
          i + x / D < tile.rows ? to_float(query_row<T>(p.q, p.size, tile.b, tile.head, i + x / D)[x % D]) : 0.f;
    __syncthreads();
    // In blocks, which keeps the rounding error of long rows down.
    float acc[kSimtRows] = {};
    for (int first = 0; physical >= 0 && first < D; first += kSimtBlock) {
      float block[kSimtRows] = {};
#pragma unroll
      for (int d = first; d < first + kSimtBlock; d += Vec<Bound>::kSize) {
        const Vec<Bound> lo = load_vec(lower + d, bounds.aligned), hi = load_vec(upper + d, bounds.aligned);
#pragma unroll
        for (int j = 0; j < Vec<Bound>::kSize; ++j)
#pragma unroll
          for (int row = 0; row < kSimtRows; ++row) {
            const float q = query[row][d + j];
            block[row] += nan_min(0.f, q) * to_float(lo.at[j]) + nan_max(0.f, q) * to_float(hi.at[j]);
          }
      }
#pragma unroll
      for (int row = 0; row < kSimtRows; ++row) acc[row] += block[row];
    }
#pragma unroll
    for (int row = 0; row < kSimtRows; ++row)
      if (i + row < tile.rows && page < p.paging.P)
        write_score(
            p, tile.b, tile.head, i + row, page,
            broken               ? NAN
            : sizeof(Bound) == 1 ? acc[row] * scale
                                 : acc[row]);
  }
  start_next_kernel();
}

}  // namespace quest::cuda
