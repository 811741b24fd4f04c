// sparse_decode: attention over the tokens of a list of pages, split over the list and combined.
//
// A chunk is kChunkTokens consecutive tokens of the list: a constant, so that a result depends on the list alone, not on
// the batch, the capacity or how many lists there are. A block takes one chunk of one list and up to kMmaHeads query
// heads that share it; each of its warps attends to kWarpTokens tokens by itself and the warps meet once, at the end.
// The combine kernel then merges the chunks in a fixed order; chunks that hold nothing add exact zeros.
//
// Scores are kept in units of log2(e), so that the exponentials are exp2.
#pragma once

#include "row_mma.cuh"

namespace quest::cuda {

constexpr int kDecodeWarps = 4;
constexpr int kDecodeThreads = kDecodeWarps * kWarpSize;
constexpr int kWarpTokens = kWarpSize;  // a lane looks up one token
constexpr int kChunkTokens = kDecodeWarps * kWarpTokens;
constexpr int kMaxHeadDim = 256;
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// The block's place: one list of pages, a tile of the query heads that share it, one chunk of the list.
struct DecodeTile {
  int chunk, b, t, list, first_head, heads, kv_head, visible;
  __device__ explicit DecodeTile(const DecodeParams& p) {
    const int share = p.size.Hq / p.Hs, tiles = (share + kMmaHeads - 1) / kMmaHeads;
    int i = blockIdx.x;
    chunk = i % p.chunks, i /= p.chunks;
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

// Where the rows of token i of the list are in the caches. A page that does not exist, where the tables promise one, has
// no rows but a NaN score, so that the mistake shows.
struct Token {
  int64_t k, v;  // element offsets, -1 where there is nothing to read
  float bias;    // 0, -inf for no token, NaN for a broken page
};

__device__ __forceinline__ Token find_token(const DecodeParams& p, const DecodeTile& tile, int i) {
  const Paging& g = p.paging;
  const int entry = i >> g.page_shift, slot = i & (g.page_size() - 1);
  int page = -1;
  if (entry < p.K)
    page = p.pages ? p.pages[tile.b * p.pages_stride_b + tile.t * p.pages_stride_t + tile.list * p.pages_stride_h + entry]
                   : entry;
  if (page == -1) return {-1, -1, -INFINITY};
  if (page < 0 || page >= g.P) return {-1, -1, tile.visible ? NAN : -INFINITY};
  if ((page << g.page_shift) + slot >= tile.visible) return {-1, -1, -INFINITY};
  const int64_t physical = g.physical(tile.b, page);
  if (physical < 0) return {-1, -1, NAN};
  return {
      physical * p.k_cache.stride_n + tile.kv_head * p.k_cache.stride_h + slot * p.k_cache.stride_s,
      physical * p.v_cache.stride_n + tile.kv_head * p.v_cache.stride_h + slot * p.v_cache.stride_s, 0.f};
}

// What a warp knows after its tokens, for each head: the largest score, the sum of weights, the weighted values.
struct WarpResults {
  float max[kDecodeWarps][kMmaHeads];
  float sum[kDecodeWarps][kMmaHeads];
};

__device__ __forceinline__ float safe_max(float m) { return m == -INFINITY ? 0.f : m; }

// fp16 and bf16 on the tensor cores: all of a warp's keys and values are asked for before the first is used.
template <class T, int D>
struct MmaDecode {
  static constexpr int kSteps = kWarpTokens / kMmaRows;
  struct Shared {};

  static __device__ __forceinline__ void warp_attend(
      const DecodeParams& p, const DecodeTile& tile, Token token, float* out, float* max_out, float* sum_out, Shared&) {
    const int lane = threadIdx.x % kWarpSize, r = lane / 4, c = lane % 4;
    const T* const k_base = static_cast<const T*>(p.k_cache.data);
    const T* const v_base = static_cast<const T*>(p.v_cache.data);
    const auto row = [](const T* base, int64_t offset, int from) {
      const int64_t at = __shfl_sync(kFullMask, offset, from);
      return at < 0 ? nullptr : base + at;
    };

    RowPieces<D> query;
    const T* const q = static_cast<const T*>(p.q.data) + tile.b * p.q.stride_b + tile.t * p.q.stride_t;
    query.load(r < tile.heads ? q + (tile.first_head + r) * p.q.stride_h : nullptr);

    SixteenRows<D> keys[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      keys[s].low.load(row(k_base, token.k, s * kMmaRows + r));
      keys[s].high.load(row(k_base, token.k, s * kMmaRows + r + 8));
    }
    ValuePieces<D> values[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; ++s)
#pragma unroll
      for (int j = 0; j < 4; ++j) values[s].load(j, row(v_base, token.v, s * kMmaRows + 2 * c + j % 2 + j / 2 * 8));

    const float scale = p.scale * kLog2e;
    float score[kSteps][4];
    float top[2] = {-INFINITY, -INFINITY}, sum[2] = {};
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      float acc[4] = {};
      dot<T>(acc, keys[s], query);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        score[s][e] = acc[e] * scale + __shfl_sync(kFullMask, token.bias, s * kMmaRows + r + e / 2 * 8);
        top[e % 2] = fmaxf(top[e % 2], score[s][e]);
      }
    }
#pragma unroll
    for (int step = 4; step < kWarpSize; step *= 2)
#pragma unroll
      for (int e = 0; e < 2; ++e) top[e] = fmaxf(top[e], __shfl_xor_sync(kFullMask, top[e], step));

    OutTile<D> tile_out;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        score[s][e] = exp2f(score[s][e] - safe_max(top[e % 2]));
        sum[e % 2] += score[s][e];
      }
      tile_out.template add<T>(values[s], score[s]);
    }
#pragma unroll
    for (int step = 4; step < kWarpSize; step *= 2)
#pragma unroll
      for (int e = 0; e < 2; ++e) sum[e] += __shfl_xor_sync(kFullMask, sum[e], step);

    if (r == 0)
#pragma unroll
      for (int e = 0; e < 2; ++e) max_out[2 * c + e] = top[e], sum_out[2 * c + e] = sum[e];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (2 * c + e >= tile.heads) continue;
#pragma unroll
      for (int i = 0; i < OutTile<D>::kCount; ++i) {
        const int d = (8 * i + r) * 8;
        if (D % 64 != 0 && d >= D) continue;
        float4* const to = reinterpret_cast<float4*>(out + (2 * c + e) * D + d);
        const auto& a = tile_out.acc[i];
        to[0] = {a[0][e], a[0][e + 2], a[1][e], a[1][e + 2]};
        to[1] = {a[2][e], a[2][e + 2], a[3][e], a[3][e + 2]};
      }
    }
  }
};

// Float32, and caches whose strides forbid 16-byte loads: a lane owns a key, then a head dimension.
template <class T>
struct SimtDecode {
  struct Shared {
    float query[kMmaHeads][kMaxHeadDim];
    float weight[kDecodeWarps][kMmaHeads][kWarpTokens];
  };

  static __device__ __forceinline__ void warp_attend(
      const DecodeParams& p, const DecodeTile& tile, Token token, float* out, float* max_out, float* sum_out,
      Shared& shared) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, D = p.size.D;
    const T* const q = static_cast<const T*>(p.q.data) + tile.b * p.q.stride_b + tile.t * p.q.stride_t;
    for (int x = threadIdx.x; x < kMmaHeads * D; x += kDecodeThreads)
      shared.query[x / D][x % D] =
          x / D < tile.heads ? to_float(q[(tile.first_head + x / D) * p.q.stride_h + x % D]) : 0.f;
    __syncthreads();

    float acc[kMmaHeads] = {};
    if (token.k >= 0) {
      const T* const key = static_cast<const T*>(p.k_cache.data) + token.k;
      for (int d = 0; d < D; d += Vec<T>::kSize) {
        const Vec<T> x = load_vec(key + d, p.k_cache.aligned);
#pragma unroll
        for (int j = 0; j < Vec<T>::kSize; ++j)
#pragma unroll
          for (int h = 0; h < kMmaHeads; ++h) acc[h] += shared.query[h][d + j] * to_float(x.at[j]);
      }
    }
#pragma unroll
    for (int h = 0; h < kMmaHeads; ++h) {
      const float score = acc[h] * (p.scale * kLog2e) + token.bias;
      float top = score;
      for (int step = 1; step < kWarpSize; step *= 2) top = fmaxf(top, __shfl_xor_sync(kFullMask, top, step));
      const float weight = exp2f(score - safe_max(top));
      float sum = weight;
      for (int step = 1; step < kWarpSize; step *= 2) sum += __shfl_xor_sync(kFullMask, sum, step);
      shared.weight[warp][h][lane] = weight;
      if (lane == 0) max_out[h] = top, sum_out[h] = sum;
    }
    __syncwarp();

    const T* const values = static_cast<const T*>(p.v_cache.data);
    for (int first = 0; first < D; first += kWarpSize) {
      const int d = first + lane;
      float sums[kMmaHeads] = {};
      for (int i = 0; i < kWarpTokens; ++i) {
        const int64_t at = __shfl_sync(kFullMask, token.v, i);
        const float x = at >= 0 && d < D ? to_float(values[at + d]) : 0.f;
#pragma unroll
        for (int h = 0; h < kMmaHeads; ++h) sums[h] += shared.weight[warp][h][i] * x;
      }
      if (d < D)
#pragma unroll
        for (int h = 0; h < kMmaHeads; ++h) out[h * D + d] = sums[h];
    }
  }
};

__device__ __forceinline__ int64_t query_index(const DecodeParams& p, int b, int t, int head) {
  return (int64_t{b} * p.size.T + t) * p.size.Hq + head;
}

template <class T, class Attend>
__global__ void __launch_bounds__(kDecodeThreads) decode_chunk_kernel(const DecodeParams p) {
  extern __shared__ __align__(16) float warp_out[];  // [kDecodeWarps, kMmaHeads, D]
  __shared__ WarpResults results;
  __shared__ typename Attend::Shared shared;
  const DecodeTile tile(p);
  const int warp = threadIdx.x / kWarpSize, D = p.size.D;
  const bool live = p.pages || tile.chunk * kChunkTokens < tile.visible;
  if (!live && p.chunks > 1) return;  // the combine kernel does not look past the last token either

  const Token token = find_token(p, tile, tile.chunk * kChunkTokens + threadIdx.x);
  const bool any = __syncthreads_or(token.bias != -INFINITY);
  if (any)
    Attend::warp_attend(
        p, tile, token, warp_out + warp * kMmaHeads * D, results.max[warp], results.sum[warp], shared);
  __syncthreads();

  for (int h = 0; h < tile.heads; ++h) {
    const int64_t row = query_index(p, tile.b, tile.t, tile.first_head + h);
    float top = -INFINITY, weight[kDecodeWarps], sum = 0.f;
    if (any) {
#pragma unroll
      for (int w = 0; w < kDecodeWarps; ++w) top = fmaxf(top, results.max[w][h]);
#pragma unroll
      for (int w = 0; w < kDecodeWarps; ++w) {
        weight[w] = exp2f(results.max[w][h] - safe_max(top));
        sum += weight[w] * results.sum[w][h];
      }
    }
    // NaN scores leave the maximum alone and make the sum NaN, and with it the result.
    const bool empty = sum == 0.f;
    const float lse = empty ? -INFINITY : safe_max(top) + log2f(sum);
    if (threadIdx.x == 0) {
      if (p.chunks > 1) p.partial_lse[row * p.chunks + tile.chunk] = lse;
      else p.lse[row] = lse * kLn2;
    }
    if (empty && p.chunks > 1) continue;
    for (int d = threadIdx.x; d < D; d += kDecodeThreads) {
      float x = 0.f;
      if (!empty) {
#pragma unroll
        for (int w = 0; w < kDecodeWarps; ++w) x += weight[w] * warp_out[(w * kMmaHeads + h) * D + d];
        x /= sum;
      }
      if (p.chunks > 1) p.partial_out[(row * p.chunks + tile.chunk) * D + d] = x;
      else static_cast<T*>(p.out)[row * D + d] = from_float<T>(x);
    }
  }
}

constexpr int kCombineThreads = 256;

// Adds up x over the block in an order that depends on the thread alone.
template <class Op>
__device__ __forceinline__ float block_reduce(float x, float* shared, Op op) {
  for (int step = 1; step < kWarpSize; step *= 2) x = op(x, __shfl_xor_sync(kFullMask, x, step));
  __syncthreads();
  if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = x;
  __syncthreads();
  x = shared[0];
  for (int w = 1; w < kCombineThreads / kWarpSize; ++w) x = op(x, shared[w]);
  return x;
}

// A block merges the chunks of one query head.
template <class T>
__global__ void __launch_bounds__(kCombineThreads) decode_combine_kernel(const DecodeParams p) {
  __shared__ float shared[kCombineThreads];
  const int D = p.size.D, row = blockIdx.x;
  const int t = row / p.size.Hq % p.size.T, b = row / p.size.Hq / p.size.T;
  const int visible = p.paging.visible(b, t, p.size.T);
  const int chunks = p.pages ? p.chunks : min(p.chunks, (visible + kChunkTokens - 1) / kChunkTokens);
  const float* const lse = p.partial_lse + int64_t{row} * p.chunks;
  const float* const out = p.partial_out + int64_t{row} * p.chunks * D;

  float top = -INFINITY;
  for (int i = threadIdx.x; i < chunks; i += kCombineThreads) top = fmaxf(top, lse[i]);
  top = safe_max(block_reduce(top, shared, [](float a, float b) { return fmaxf(a, b); }));
  float sum = 0.f;
  for (int i = threadIdx.x; i < chunks; i += kCombineThreads) sum += exp2f(lse[i] - top);
  sum = block_reduce(sum, shared, [](float a, float b) { return a + b; });
  const bool empty = sum == 0.f;

  // Threads are columns x slices: slice s adds up chunks s, s + slices, ...
  constexpr int kColumns = 32, kSlices = kCombineThreads / kColumns;
  const int column = threadIdx.x % kColumns, slice = threadIdx.x / kColumns;
  for (int first = 0; first < D; first += kColumns) {
    const int d = first + column;
    float x = 0.f;
    if (d < D)
      for (int i = slice; i < chunks; i += kSlices) {
        const float l = lse[i];
        if (l != -INFINITY) x += exp2f(l - top) * out[int64_t{i} * D + d];
      }
    __syncthreads();
    shared[threadIdx.x] = x;
    __syncthreads();
    if (slice == 0 && d < D) {
      for (int s = 1; s < kSlices; ++s) x += shared[s * kColumns + column];
      static_cast<T*>(p.out)[int64_t{row} * D + d] = from_float<T>(empty ? 0.f : x / sum);
    }
  }
  if (threadIdx.x == 0) p.lse[row] = empty ? -INFINITY : (top + log2f(sum)) * kLn2;
}

}  // namespace quest::cuda
