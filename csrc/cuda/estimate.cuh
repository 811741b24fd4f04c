// estimate: scores[b, t, h, p] = q- . lower + q+ . upper of page p.
//
// A block owns a tile of pages of one sequence and KV head. The bounds are read once and meet all T * G query rows of
// the head; the grid covers the capacity P, and blocks past the last page only write -inf.
#pragma once

#include <cutlass/fast_math.h>

#include "core/ptx.cuh"
#include "tile/page_scores.cuh"

namespace quest::cuda {

constexpr int kEstimateWarps = 4;
constexpr int kEstimateThreads = kEstimateWarps * kWarpSize;

// A block does little work, so the host prepares its divisions.
struct EstimateKernelParams {
  EstimateParams op;
  cutlass::FastDivmod tiles, heads, group;  // tiles of a sequence and KV head, KV heads, G
  EstimateKernelParams(const EstimateParams& p, int pages_per_tile)
      : op(p), tiles((p.paging.P + pages_per_tile - 1) / pages_per_tile), heads(p.size.Hkv), group(p.size.group()) {}
  int64_t blocks() const { return int64_t{tiles.divisor} * heads.divisor * op.size.B; }
};

struct EstimateTile {
  int b, head, first_page, length, pages, new_tokens, rows;  // rows: T * G query rows
  __device__ EstimateTile(const EstimateKernelParams& params, int pages_per_tile) {
    const EstimateParams& p = params.op;
    int tile, sequence_head;
    params.tiles(sequence_head, tile, static_cast<int>(blockIdx.x));
    params.heads(b, head, sequence_head);
    first_page = tile * pages_per_tile;
    length = p.paging.length(b), pages = p.paging.pages_of(length);
    new_tokens = p.paging.new_tokens(b, p.size.T);
    rows = p.size.T * params.group.divisor;
  }
};

// Query row i of a KV head: a new token, and a query head.
struct QueryRow {
  int t, h;
  __device__ QueryRow(const EstimateKernelParams& params, int kv_head, int i) {
    int in_group;
    params.group(t, in_group, i);
    h = kv_head * params.group.divisor + in_group;
  }
};

template <class T>
__device__ __forceinline__ const T* query_row(const EstimateKernelParams& params, int b, int kv_head, int i) {
  const QueryRow row(params, kv_head, i);
  const Query& q = params.op.q;
  return static_cast<const T*>(q.data) + b * q.stride_b + row.t * q.stride_t + row.h * q.stride_h;
}

// The scores of a query row, and the number of pages it may see; pages past those score -inf.
struct ScoreRow {
  float* scores;
  int P, visible;
  __device__ ScoreRow(const EstimateKernelParams& params, const EstimateTile& tile, int i) {
    const EstimateParams& p = params.op;
    const QueryRow row(params, tile.head, i);
    P = p.paging.P, visible = p.paging.pages_of(Paging::visible_of(tile.length, row.t, tile.new_tokens));
    scores = p.scores + ((int64_t{tile.b} * p.size.T + row.t) * p.size.Hq + row.h) * P;
  }
  __device__ __forceinline__ void write(int page, float score) const {
    if (page < P) scores[page] = page < visible ? score : -INFINITY;
  }
};

// The physical page, or -1 past the last page. invalid: the table has no such page, so its scores become NaN.
__device__ __forceinline__ int64_t
bounds_page(const EstimateParams& p, const EstimateTile& tile, int page, bool& invalid) {
  // Looked up before the length is used, so that the two loads wait together.
  const int64_t physical = p.paging.physical(tile.b, page);
  invalid = physical < 0 && page < tile.pages;
  return page < tile.pages ? physical : -1;
}

constexpr int kMmaEstimatePages = kEstimateWarps * kMmaRows;

// With bounds of 8 or 4 bits more resident blocks are worth a few registers less.
template <class Bound, int D>
constexpr int kEstimateBlocks = kHasScales<Bound> && D <= 128 ? 6 : 1;

template <class T, class Bound, int D>
__global__ void __launch_bounds__(kEstimateThreads, kEstimateBlocks<Bound, D>)
    estimate_mma_kernel(const EstimateKernelParams params) {
  wait_for_previous_kernel();
  const EstimateParams& p = params.op;
  const EstimateTile tile(params, kMmaEstimatePages);
  const int lane = threadIdx.x % kWarpSize, r = lane / 4, c = lane % 4;
  const int first = tile.first_page + threadIdx.x / kWarpSize * kMmaRows;
  if (first >= p.paging.P) return;
  if (first >= tile.pages) {  // a batch may be far shorter than its capacity
    for (int i = lane / kMmaRows; i < tile.rows; i += kWarpSize / kMmaRows)
      ScoreRow(params, tile, i).write(first + lane % kMmaRows, -INFINITY);
    return;
  }

  // Lanes i and i + 16 look up page i and its scale.
  bool invalid;
  const int64_t physical = bounds_page(p, tile, first + lane % kMmaRows, invalid);
  PageScoreTile<T, Bound, D> bounds;
#pragma unroll
  for (int half = 0; half < 2; ++half)
    bounds.load(half, p.k_bounds, __shfl_sync(kFullMask, physical, r + half * 8), tile.head);
  float scale = invalid ? NAN : 1.f;
  if (kHasScales<Bound> && physical >= 0)
    scale = p.k_bounds.scales[physical * p.k_bounds.scales_stride_n + tile.head * p.k_bounds.scales_stride_h];

  for (int i = 0; i < tile.rows; i += kMmaHeads) {
    SignedQuery<T, Bound, D> query;
    query.load(i + r < tile.rows ? query_row<T>(params, tile.b, tile.head, i + r) : nullptr);
    float scores[4];
    bounds.unpack_anew();
#pragma unroll
    for (int half = 0; half < 2; ++half) bounds.scale[half] = __shfl_sync(kFullMask, scale, r + half * 8);
    bounds.score(scores, query);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (i + 2 * c + h >= tile.rows) break;
      const ScoreRow row(params, tile, i + 2 * c + h);
      row.write(first + r, scores[h]);
      row.write(first + r + 8, scores[h + 2]);
    }
  }
  start_next_kernel();
}

// Float32, and caches whose strides forbid 16-byte loads: a thread owns a page and eight query rows at a time.
constexpr int kSimtRows = 8;

template <class T, class Bound>
__global__ void __launch_bounds__(kEstimateThreads) estimate_simt_kernel(const EstimateKernelParams params) {
  __shared__ float query[kSimtRows][kMaxHeadDim];
  wait_for_previous_kernel();
  const EstimateParams& p = params.op;
  const EstimateTile tile(params, kEstimateThreads);
  const int page = tile.first_page + threadIdx.x, D = p.size.D;
  const Bounds& bounds = p.k_bounds;
  bool invalid;
  const int64_t physical = bounds_page(p, tile, page, invalid);
  const Bound* const lower =
      static_cast<const Bound*>(bounds.data) + physical * bounds.stride_n + tile.head * bounds.stride_h;
  const Bound* const upper = lower + bounds.stride_c;
  const float scale = kHasScales<Bound> && physical >= 0
                          ? bounds.scales[physical * bounds.scales_stride_n + tile.head * bounds.scales_stride_h]
                          : 1.f;

  for (int i = 0; i < tile.rows; i += kSimtRows) {
    __syncthreads();
    for (int x = threadIdx.x; x < kSimtRows * D; x += kEstimateThreads)
      query[x / D][x % D] =
          i + x / D < tile.rows ? to_float(query_row<T>(params, tile.b, tile.head, i + x / D)[x % D]) : 0.f;
    __syncthreads();
    // Short sums keep the rounding error of long rows down.
    float acc[kSimtRows] = {};
    for (int first = 0; physical >= 0 && first < D; first += kSimtBlock) {
      float block[kSimtRows] = {};
      const auto add = [&](int d, float lo, float hi) {
#pragma unroll
        for (int row = 0; row < kSimtRows; ++row) {
          const float q = query[row][d];
          block[row] += nan_min(0.f, q) * lo + nan_max(0.f, q) * hi;
        }
      };
      if constexpr (std::is_same_v<Bound, Nibbles>) {
#pragma unroll
        for (int d = first; d < first + kSimtBlock; d += 2) {
          const int lo = lower[d / 2].bits, hi = upper[d / 2].bits;
          add(d, (lo & 15) - 8, (hi & 15) - 8);
          add(d + 1, (lo >> 4) - 8, (hi >> 4) - 8);
        }
      } else {
#pragma unroll
        for (int d = first; d < first + kSimtBlock; d += Vec<Bound>::kSize) {
          const Vec<Bound> lo = load_vec(lower + d, bounds.aligned), hi = load_vec(upper + d, bounds.aligned);
#pragma unroll
          for (int j = 0; j < Vec<Bound>::kSize; ++j) add(d + j, to_float(lo.at[j]), to_float(hi.at[j]));
        }
      }
#pragma unroll
      for (int row = 0; row < kSimtRows; ++row) acc[row] += block[row];
    }
#pragma unroll
    for (int row = 0; row < kSimtRows; ++row)
      if (i + row < tile.rows)
        ScoreRow(params, tile, i + row).write(page, invalid ? NAN : kHasScales<Bound> ? acc[row] * scale : acc[row]);
  }
  start_next_kernel();
}

}  // namespace quest::cuda
