// Attention of up to kMmaHeads query heads over one chunk of tokens by one block: each warp attends to its share of the
// tokens by itself, then the warps meet. Scores stay as the dot products left them and only their differences are
// scaled, so that large logits lose nothing. What sparse_decode and decode_step share.
//
// A token is given by the physical page it is in and its place there.
#pragma once

#include <cstddef>

#include "row_mma.cuh"
#include "softmax.cuh"

namespace quest::cuda {

constexpr int kNoToken = -1;     // nothing to attend to
constexpr int kBrokenPage = -2;  // no such page where the tables promise one: a NaN score, so that the mistake shows
constexpr int kMaxHeadDim = 256;
constexpr int kSimtBlock = 16;  // divides every head_dim

__device__ __forceinline__ float token_bias(int page) { return page >= 0 ? 0.f : page == kNoToken ? -INFINITY : NAN; }

template <class T>
__device__ __forceinline__ const T* token_row(const Cache& cache, int page, int head, int slot) {
  if (page < 0) return nullptr;
  return static_cast<const T*>(cache.data) + int64_t{page} * cache.stride_n + head * cache.stride_h +
         slot * cache.stride_s;
}

// Asks for a row of `bytes` bytes without waiting for it. Not the bulk form of it, which takes one lane at a time.
__device__ __forceinline__ void prefetch_row(const void* row, int bytes) {
#pragma unroll
  for (int i = 0; i < bytes; i += 128)
    asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const std::byte*>(row) + i));
}

// The query heads of a block: head h of `heads` is at data + h * stride, and all read KV head kv_head.
template <class T>
struct QueryTile {
  const T* data;
  int64_t stride;
  int heads, kv_head;
};

// fp16 and bf16 on the tensor cores. Lane i and i + 16 of a warp look up its token i.
template <class T, int D>
struct MmaAttend {
  using Element = T;
  static constexpr int kWarps = 8, kThreads = kWarps * kWarpSize;
  static constexpr int kTokens = kChunkTokens / kWarps;
  static_assert(kTokens == kMmaRows);
  static constexpr int kMaxD = D;
  struct Shared {};

  RowPieces<D> query, keys[2];
  ValuePieces<D> values;
  float bias;

  __device__ __forceinline__ MmaAttend(const QueryTile<T>& q, int, Shared&) {
    const int r = threadIdx.x % kWarpSize / 4;
    query.load(r < q.heads ? q.data + r * q.stride : nullptr);
  }

  // page: of this lane's token; slot: the place of the warp's token i is (slot + i) % page_size.
  __device__ __forceinline__ void load(
      const Cache& k, const Cache& v, const QueryTile<T>& q, int page, int first, int page_size) {
    const int lane = threadIdx.x % kWarpSize, r = lane / 4, c = lane % 4;
    const auto row = [&](const Cache& cache, int i) {
      return token_row<T>(cache, __shfl_sync(kFullMask, page, i), q.kv_head, (first + i) & (page_size - 1));
    };
    keys[0].load(row(k, r));
    keys[1].load(row(k, r + 8));
#pragma unroll
    for (int j = 0; j < 4; ++j) values.load(j, row(v, 2 * c + j % 2 + j / 2 * 8));
    bias = token_bias(page);
  }

  // Lane i asks for the keys of token i, lane i + 16 for its values.
  static __device__ __forceinline__ void prefetch(
      const Cache& k, const Cache& v, const QueryTile<T>& q, int page, int first, int page_size) {
    const int i = threadIdx.x % kTokens;
    const T* const row =
        token_row<T>(threadIdx.x % kWarpSize < kTokens ? k : v, page, q.kv_head, (first + i) & (page_size - 1));
    if (row) prefetch_row(row, D * sizeof(T));
  }

  __device__ __forceinline__ void attend(
      const Softmax& softmax, const Cache&, const Cache&, const QueryTile<T>& q, float* out, float* max_out,
      float* sum_out, Shared&) {
    const int lane = threadIdx.x % kWarpSize, r = lane / 4, c = lane % 4;
    float score[4] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {};
    dot<T>(score, keys[0], keys[1], query);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      score[e] = score[e] * softmax.sign + __shfl_sync(kFullMask, bias, r + e / 2 * 8);
      top[e % 2] = fmaxf(top[e % 2], score[e]);
    }
#pragma unroll
    for (int step = 4; step < kWarpSize; step *= 2)
#pragma unroll
      for (int e = 0; e < 2; ++e) top[e] = fmaxf(top[e], __shfl_xor_sync(kFullMask, top[e], step));
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      score[e] = softmax.weight(score[e], top[e % 2]);
      sum[e % 2] += score[e];
    }
    OutTile<D> tile_out;
    tile_out.template add<T>(values, score);
#pragma unroll
    for (int step = 4; step < kWarpSize; step *= 2)
#pragma unroll
      for (int e = 0; e < 2; ++e) sum[e] += __shfl_xor_sync(kFullMask, sum[e], step);

    if (r == 0)
#pragma unroll
      for (int e = 0; e < 2; ++e) max_out[2 * c + e] = top[e], sum_out[2 * c + e] = sum[e];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      if (2 * c + e >= q.heads) continue;
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
struct SimtAttend {
  using Element = T;
  static constexpr int kWarps = 4, kThreads = kWarps * kWarpSize;
  static constexpr int kTokens = kChunkTokens / kWarps;
  static_assert(kTokens == kWarpSize);
  static constexpr int kMaxD = kMaxHeadDim;
  struct Shared {
    float query[kMmaHeads][kMaxHeadDim];
    float weight[kWarps][kMmaHeads][kTokens];
  };

  int D, page, slot, first, page_size;

  __device__ __forceinline__ SimtAttend(const QueryTile<T>& q, int head_dim, Shared& shared) : D(head_dim) {
    for (int x = threadIdx.x; x < kMmaHeads * D; x += kThreads)
      shared.query[x / D][x % D] = x / D < q.heads ? to_float(q.data[x / D * q.stride + x % D]) : 0.f;
    __syncthreads();
  }

  __device__ __forceinline__ void load(
      const Cache&, const Cache&, const QueryTile<T>&, int page_, int first_, int page_size_) {
    page = page_, first = first_, page_size = page_size_;
    slot = (first + threadIdx.x % kWarpSize) & (page_size - 1);
  }

  static __device__ __forceinline__ void prefetch(const Cache&, const Cache&, const QueryTile<T>&, int, int, int) {}

  __device__ __forceinline__ void attend(
      const Softmax& softmax, const Cache& k, const Cache& v, const QueryTile<T>& q, float* out, float* max_out,
      float* sum_out, Shared& shared) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    // Short runs that meet pairwise, and their sum with its rounding carried along (Kahan): large scores lose nothing.
    float acc[kMmaHeads] = {}, carry[kMmaHeads] = {};
    const T* const key = token_row<T>(k, page, q.kv_head, slot);
    for (int block = 0; key && block < D; block += kSimtBlock) {
      float run[kMmaHeads][4] = {};
#pragma unroll
      for (int d = 0; d < kSimtBlock; d += Vec<T>::kSize) {
        const Vec<T> x = load_vec(key + block + d, k.aligned);
#pragma unroll
        for (int j = 0; j < Vec<T>::kSize; ++j)
#pragma unroll
          for (int h = 0; h < kMmaHeads; ++h) run[h][j % 4] += shared.query[h][block + d + j] * to_float(x.at[j]);
      }
#pragma unroll
      for (int h = 0; h < kMmaHeads; ++h) {
        const float next = (run[h][0] + run[h][1]) + (run[h][2] + run[h][3]) - carry[h];
        const float sum = acc[h] + next;
        carry[h] = (sum - acc[h]) - next;
        acc[h] = sum;
      }
    }
#pragma unroll
    for (int h = 0; h < kMmaHeads; ++h) {
      const float score = acc[h] * softmax.sign + token_bias(page);
      float top = score;
      for (int step = 1; step < kWarpSize; step *= 2) top = fmaxf(top, __shfl_xor_sync(kFullMask, top, step));
      const float weight = softmax.weight(score, top);
      float sum = weight;
      for (int step = 1; step < kWarpSize; step *= 2) sum += __shfl_xor_sync(kFullMask, sum, step);
      shared.weight[warp][h][lane] = weight;
      if (lane == 0) max_out[h] = top, sum_out[h] = sum;
    }
    __syncwarp();

    for (int begin = 0; begin < D; begin += kWarpSize) {
      const int d = begin + lane;
      float sums[kMmaHeads] = {};
      for (int run = 0; run < kTokens; run += 8) {  // runs, as in the scores
        float part[kMmaHeads] = {};
#pragma unroll
        for (int i = run; i < run + 8; ++i) {
          const T* const value =
              token_row<T>(v, __shfl_sync(kFullMask, page, i), q.kv_head, (first + i) & (page_size - 1));
          const float x = value && d < D ? to_float(value[d]) : 0.f;
#pragma unroll
          for (int h = 0; h < kMmaHeads; ++h) part[h] += shared.weight[warp][h][i] * x;
        }
#pragma unroll
        for (int h = 0; h < kMmaHeads; ++h) sums[h] += part[h];
      }
#pragma unroll
      for (int h = 0; h < kMmaHeads; ++h)
        if (d < D && h < q.heads) out[h * D + d] = sums[h];
    }
    __syncwarp();
  }
};

// What the warps of a block know after their tokens, for each head.
template <int kWarps>
struct WarpResults {
  float max[kWarps][kMmaHeads];
  float sum[kWarps][kMmaHeads];
};

// The warps' results for one head and every so many vectors of four head dimensions, by kHeadThreads threads a head.
template <class Attend>
struct ChunkMerge {
  static constexpr int kHeadThreads = Attend::kThreads / kMmaHeads;
  static constexpr int kColumns = (Attend::kMaxD / 4 + kHeadThreads - 1) / kHeadThreads;
  using Chunk = Partial<kColumns>;

  static __device__ __forceinline__ int head() { return threadIdx.x / kHeadThreads; }
  static __device__ __forceinline__ int first_column() { return threadIdx.x % kHeadThreads; }

  // warp_out: [kWarps, heads, D].
  static __device__ __forceinline__ Chunk
  merge(const Softmax& softmax, const WarpResults<Attend::kWarps>& results, const float* warp_out, int heads, int D) {
    Chunk chunk;
    float weight[Attend::kWarps];
#pragma unroll
    for (int w = 0; w < Attend::kWarps; ++w) chunk.top = fmaxf(chunk.top, results.max[w][head()]);
#pragma unroll
    for (int w = 0; w < Attend::kWarps; ++w) {
      weight[w] = softmax.weight(results.max[w][head()], chunk.top);
      chunk.sum = __fmaf_rn(weight[w], results.sum[w][head()], chunk.sum);
    }
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int column = first_column() + i * kHeadThreads;
      if (column * 4 >= D) continue;
      float4& x = chunk.out[i];
#pragma unroll
      for (int w = 0; w < Attend::kWarps; ++w) {
        const float4 y = reinterpret_cast<const float4*>(warp_out + (w * heads + head()) * D)[column];
        x.x = __fmaf_rn(weight[w], y.x, x.x), x.y = __fmaf_rn(weight[w], y.y, x.y);
        x.z = __fmaf_rn(weight[w], y.z, x.z), x.w = __fmaf_rn(weight[w], y.w, x.w);
      }
    }
    return chunk;
  }
};

}  // namespace quest::cuda
