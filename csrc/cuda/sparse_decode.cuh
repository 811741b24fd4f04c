// sparse_decode: attention over the tokens of a list of pages, split over the list and combined.
//
// A chunk is kChunkTokens consecutive tokens of the list and a span kSpanChunks consecutive chunks. The chunks of a
// span are folded in order, spans in a fixed order after that; both are constants, so a result depends on the list
// alone, not on the batch, the capacity or how many lists there are. What holds no token is an exact identity of the
// fold. Small calls give every chunk a block of its own and leave the folding to the combine kernel; large ones give a
// block a whole span, which it folds as it goes: the same arithmetic, so the same bits.
//
// In a block, up to kMmaHeads query heads share a list; each warp attends to kWarpTokens tokens of the chunk by itself,
// then the warps meet. The next chunk is asked for before that. Scores stay as the dot products left them and only
// their differences are scaled, so that large logits lose nothing.
#pragma once

#include "launch_order.cuh"
#include "row_mma.cuh"

namespace quest::cuda {

constexpr int kDecodeWarps = 4;
constexpr int kDecodeThreads = kDecodeWarps * kWarpSize;
constexpr int kWarpTokens = kWarpSize;  // a lane looks up one token
constexpr int kChunkTokens = kDecodeWarps * kWarpTokens;
constexpr int kSpanChunks = 8;
constexpr int kMaxHeadDim = 256;
constexpr int kSimtBlock = 16;  // divides every head_dim

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

// Where the rows of token i of the list are in the caches. A page that does not exist, where the tables promise one,
// has no rows but a NaN score, so that the mistake shows.
struct Token {
  int64_t k, v;  // element offsets, -1 where there is nothing to read
  float bias;    // 0, -inf for no token, NaN for a broken page
};

__device__ __forceinline__ Token find_token(const DecodeParams& p, const DecodeTile& tile, int i) {
  const Paging& g = p.paging;
  const int entry = i >> g.page_shift, slot = i & (g.page_size() - 1);
  int page = -1;
  if (entry < p.K)
    page = p.pages
               ? p.pages[tile.b * p.pages_stride_b + tile.t * p.pages_stride_t + tile.list * p.pages_stride_h + entry]
               : entry;
  // Looked up before the length is asked about: the two loads then wait together.
  const int64_t physical = g.physical(tile.b, page);
  const bool in_table = page >= 0 && page < g.P;
  if (page == -1 || tile.visible == 0 || (in_table && (page << g.page_shift) + slot >= tile.visible))
    return {-1, -1, -INFINITY};
  if (physical < 0) return {-1, -1, NAN};
  return {
      physical * p.k_cache.stride_n + tile.kv_head * p.k_cache.stride_h + slot * p.k_cache.stride_s,
      physical * p.v_cache.stride_n + tile.kv_head * p.v_cache.stride_h + slot * p.v_cache.stride_s, 0.f};
}

// How scores become weights. A negative scale turns the scores round, so that the largest still has weight 1.
struct Softmax {
  float sign, scale;
  __device__ explicit Softmax(float s) : sign(s < 0.f ? -1.f : 1.f), scale(fabsf(s)) {}
  // -inf is no token, whatever the largest score is and even where the scale is 0.
  __device__ __forceinline__ float weight(float score, float top) const {
    return score == -INFINITY ? 0.f : expf((score - top) * scale);
  }
};

// What a warp knows after its tokens, for each head: the largest score, the sum of weights, the weighted values.
struct WarpResults {
  float max[kDecodeWarps][kMmaHeads];
  float sum[kDecodeWarps][kMmaHeads];
};

// fp16 and bf16 on the tensor cores: all of a warp's keys and values are asked for before the first is used, as far as
// the registers hold them.
template <class T, int D>
struct MmaDecode {
  static constexpr int kMaxD = D;
  static constexpr bool kEarlyValues = D <= 128;
  static constexpr int kSteps = kWarpTokens / kMmaRows;
  struct Shared {};

  RowPieces<D> query;
  SixteenRows<D> keys[kSteps];
  ValuePieces<D> values[kSteps];
  Token token;

  __device__ __forceinline__ MmaDecode(const DecodeParams& p, const DecodeTile& tile, Shared&) {
    const int r = threadIdx.x % kWarpSize / 4;
    const T* const q = static_cast<const T*>(p.q.data) + tile.b * p.q.stride_b + tile.t * p.q.stride_t;
    query.load(r < tile.heads ? q + (tile.first_head + r) * p.q.stride_h : nullptr);
  }

  // The row that the token of lane `from` has in a cache.
  static __device__ __forceinline__ const T* row(const Cache& cache, int64_t offset, int from) {
    const int64_t at = __shfl_sync(kFullMask, offset, from);
    return at < 0 ? nullptr : static_cast<const T*>(cache.data) + at;
  }

  __device__ __forceinline__ void load_values(const DecodeParams& p, int step) {
    const int c = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      values[step].load(j, row(p.v_cache, token.v, step * kMmaRows + 2 * c + j % 2 + j / 2 * 8));
  }

  __device__ __forceinline__ void load(const DecodeParams& p, const Token& next) {
    const int r = threadIdx.x % kWarpSize / 4;
    token = next;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      keys[s].low.load(row(p.k_cache, token.k, s * kMmaRows + r));
      keys[s].high.load(row(p.k_cache, token.k, s * kMmaRows + r + 8));
    }
#pragma unroll
    for (int s = 0; kEarlyValues && s < kSteps; ++s) load_values(p, s);
  }

  __device__ __forceinline__ void attend(
      const DecodeParams& p, const DecodeTile& tile, float* out, float* max_out, float* sum_out, Shared&) {
    const int lane = threadIdx.x % kWarpSize, r = lane / 4, c = lane % 4;
    const Softmax softmax(p.scale);
    float score[kSteps][4];
    float top[2] = {-INFINITY, -INFINITY}, sum[2] = {};
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      float acc[4] = {};
      dot<T>(acc, keys[s], query);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        score[s][e] = acc[e] * softmax.sign + __shfl_sync(kFullMask, token.bias, s * kMmaRows + r + e / 2 * 8);
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
      if (!kEarlyValues) load_values(p, s);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        score[s][e] = softmax.weight(score[s][e], top[e % 2]);
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
  static constexpr int kMaxD = kMaxHeadDim;
  struct Shared {
    float query[kMmaHeads][kMaxHeadDim];
    float weight[kDecodeWarps][kMmaHeads][kWarpTokens];
  };

  Token token;

  __device__ __forceinline__ SimtDecode(const DecodeParams& p, const DecodeTile& tile, Shared& shared) {
    const int D = p.size.D;
    const T* const q = static_cast<const T*>(p.q.data) + tile.b * p.q.stride_b + tile.t * p.q.stride_t;
    for (int x = threadIdx.x; x < kMmaHeads * D; x += kDecodeThreads)
      shared.query[x / D][x % D] =
          x / D < tile.heads ? to_float(q[(tile.first_head + x / D) * p.q.stride_h + x % D]) : 0.f;
    __syncthreads();
  }

  __device__ __forceinline__ void load(const DecodeParams&, const Token& next) { token = next; }

  __device__ __forceinline__ void attend(
      const DecodeParams& p, const DecodeTile&, float* out, float* max_out, float* sum_out, Shared& shared) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, D = p.size.D;
    // Short runs that meet pairwise, and their sum with its rounding carried along (Kahan): large scores lose nothing.
    float acc[kMmaHeads] = {}, carry[kMmaHeads] = {};
    if (token.k >= 0) {
      const T* const key = static_cast<const T*>(p.k_cache.data) + token.k;
      for (int first = 0; first < D; first += kSimtBlock) {
        float run[kMmaHeads][4] = {};
#pragma unroll
        for (int d = 0; d < kSimtBlock; d += Vec<T>::kSize) {
          const Vec<T> x = load_vec(key + first + d, p.k_cache.aligned);
#pragma unroll
          for (int j = 0; j < Vec<T>::kSize; ++j)
#pragma unroll
            for (int h = 0; h < kMmaHeads; ++h) run[h][j % 4] += shared.query[h][first + d + j] * to_float(x.at[j]);
        }
#pragma unroll
        for (int h = 0; h < kMmaHeads; ++h) {
          const float next = (run[h][0] + run[h][1]) + (run[h][2] + run[h][3]) - carry[h];
          const float sum = acc[h] + next;
          carry[h] = (sum - acc[h]) - next;
          acc[h] = sum;
        }
      }
    }
    const Softmax softmax(p.scale);
#pragma unroll
    for (int h = 0; h < kMmaHeads; ++h) {
      const float score = acc[h] * softmax.sign + token.bias;
      float top = score;
      for (int step = 1; step < kWarpSize; step *= 2) top = fmaxf(top, __shfl_xor_sync(kFullMask, top, step));
      const float weight = softmax.weight(score, top);
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
      for (int run = 0; run < kWarpTokens; run += 8) {  // runs, as in the scores
        float part[kMmaHeads] = {};
#pragma unroll
        for (int i = run; i < run + 8; ++i) {
          const int64_t at = __shfl_sync(kFullMask, token.v, i);
          const float x = at >= 0 && d < D ? to_float(values[at + d]) : 0.f;
#pragma unroll
          for (int h = 0; h < kMmaHeads; ++h) part[h] += shared.weight[warp][h][i] * x;
        }
#pragma unroll
        for (int h = 0; h < kMmaHeads; ++h) sums[h] += part[h];
      }
      if (d < D)
#pragma unroll
        for (int h = 0; h < kMmaHeads; ++h) out[h * D + d] = sums[h];
    }
    __syncwarp();
  }
};

// A softmax in the making over some tokens, for one head and kColumns vectors of four head dimensions: the largest
// score, and relative to it the sum of weights and the weighted values. Starts as what no token gives, and folding that
// in changes nothing, bit for bit.
template <int kColumns>
struct Partial {
  float top = -INFINITY, sum = 0.f;
  float4 out[kColumns] = {};

  __device__ __forceinline__ void fold(const Partial& next, const Softmax& softmax) {
    const float both = fmaxf(top, next.top);
    const float a = softmax.weight(top, both), b = softmax.weight(next.top, both);
    // Rounded as written: the two kernels that fold must not contract it in different ways.
    const auto mix = [&](float& x, float y) { x = __fmaf_rn(a, x, __fmul_rn(b, y)); };
    top = both;
    mix(sum, next.sum);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      mix(out[i].x, next.out[i].x), mix(out[i].y, next.out[i].y);
      mix(out[i].z, next.out[i].z), mix(out[i].w, next.out[i].w);
    }
  }

  // Scores that are NaN leave the largest alone and make the sum NaN, and with it the result.
  __device__ __forceinline__ bool empty() const { return sum == 0.f; }
  __device__ __forceinline__ float lse(const Softmax& softmax) const {
    return empty() ? -INFINITY : top * softmax.scale + logf(sum);
  }

  template <class T>
  __device__ __forceinline__ void write(T* to, int i) const {
    const float4 x = out[i];
    to[0] = from_float<T>(empty() ? 0.f : x.x / sum);
    to[1] = from_float<T>(empty() ? 0.f : x.y / sum);
    to[2] = from_float<T>(empty() ? 0.f : x.z / sum);
    to[3] = from_float<T>(empty() ? 0.f : x.w / sum);
  }
};

__device__ __forceinline__ int64_t query_index(const DecodeParams& p, int b, int t, int head) {
  return (int64_t{b} * p.size.T + t) * p.size.Hq + head;
}

// A thread of the block meets the warps' results for one head and every sixteenth vector of four head dimensions.
constexpr int kHeadThreads = kDecodeThreads / kMmaHeads;

template <class T, class Attend>
__global__ void __launch_bounds__(kDecodeThreads, 2) decode_kernel(const DecodeParams p) {
  extern __shared__ __align__(16) float warp_out[];  // [kDecodeWarps, kMmaHeads, D]
  __shared__ WarpResults results;
  __shared__ typename Attend::Shared shared;
  constexpr int kColumns = (Attend::kMaxD / 4 + kHeadThreads - 1) / kHeadThreads;
  const int warp = threadIdx.x / kWarpSize, D = p.size.D;
  const int head = threadIdx.x / kHeadThreads, first_column = threadIdx.x % kHeadThreads;

  wait_for_previous_kernel();
  const DecodeTile tile(p);
  const int list_tokens = p.pages ? p.K << p.paging.page_shift : tile.visible;
  const int first_token = tile.part * p.part_chunks * kChunkTokens;
  const int end_token = min(first_token + p.part_chunks * kChunkTokens, list_tokens);
  if (first_token >= end_token && p.parts > 1) return;  // the combine kernel does not look there either

  const Softmax softmax(p.scale);
  Partial<kColumns> partial;
  Attend warp_tokens(p, tile, shared);
  Token token = find_token(p, tile, first_token + threadIdx.x);
  warp_tokens.load(p, token);
  for (int first = first_token; first < end_token; first += kChunkTokens) {
    const bool any = __syncthreads_or(token.bias != -INFINITY);
    const bool more = first + kChunkTokens < end_token;
    if (more) token = find_token(p, tile, first + kChunkTokens + threadIdx.x);
    if (any) warp_tokens.attend(p, tile, warp_out + warp * kMmaHeads * D, results.max[warp], results.sum[warp], shared);
    if (more) warp_tokens.load(p, token);
    __syncthreads();
    if (!any || head >= tile.heads) continue;

    Partial<kColumns> chunk;
    float weight[kDecodeWarps];
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) chunk.top = fmaxf(chunk.top, results.max[w][head]);
#pragma unroll
    for (int w = 0; w < kDecodeWarps; ++w) {
      weight[w] = softmax.weight(results.max[w][head], chunk.top);
      chunk.sum += weight[w] * results.sum[w][head];
    }
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int column = first_column + i * kHeadThreads;
      if (column * 4 >= D) continue;
      float4& x = chunk.out[i];
#pragma unroll
      for (int w = 0; w < kDecodeWarps; ++w) {
        const float4 y = reinterpret_cast<const float4*>(warp_out + (w * kMmaHeads + head) * D)[column];
        x.x += weight[w] * y.x, x.y += weight[w] * y.y, x.z += weight[w] * y.z, x.w += weight[w] * y.w;
      }
    }
    partial.fold(chunk, softmax);
  }
  start_next_kernel();

  if (head >= tile.heads) return;
  const int64_t row = query_index(p, tile.b, tile.t, tile.first_head + head);
  const int64_t part = row * p.parts + tile.part;
  if (first_column == 0) {
    if (p.parts == 1)
      p.lse[row] = partial.lse(softmax);
    else
      p.partial_max[part] = partial.top, p.partial_sum[part] = partial.sum;
  }
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    const int d = (first_column + i * kHeadThreads) * 4;
    if (d >= D) continue;
    if (p.parts == 1)
      partial.write(static_cast<T*>(p.out) + row * D + d, i);
    else
      *reinterpret_cast<float4*>(p.partial_out + part * D + d) = partial.out[i];
  }
}

// A block folds the parts of one query head. Threads are vectors of four head dimensions x slices: slice s takes spans
// s, s + slices, ..., then the slices are folded in order.
constexpr int kCombineThreads = 256;

template <class T, int kPartsInSpan>
__global__ void __launch_bounds__(kCombineThreads) decode_combine_kernel(const DecodeParams p) {
  __shared__ Partial<1> shared[kCombineThreads];
  const int D = p.size.D, columns = D / 4, slices = kCombineThreads / columns;
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
  if (slice < slices) {
#pragma unroll(8 / kPartsInSpan)
    for (int first = slice * kPartsInSpan; first < parts; first += slices * kPartsInSpan) {
      Partial<1> span;
      Partial<1> loaded[kPartsInSpan];
#pragma unroll
      for (int i = 0; i < kPartsInSpan; ++i) loaded[i] = load(first + i);
#pragma unroll
      for (int i = 0; i < kPartsInSpan; ++i) span.fold(loaded[i], softmax);
      total.fold(span, softmax);
    }
  }
  shared[threadIdx.x] = total;
  __syncthreads();
  start_next_kernel();
  if (slice != 0) return;
  for (int s = 1; s < slices; ++s) total.fold(shared[s * columns + column], softmax);
  total.write(static_cast<T*>(p.out) + row * D + column * 4, 0);
  if (column == 0) p.lse[row] = total.lse(softmax);
}

}  // namespace quest::cuda
