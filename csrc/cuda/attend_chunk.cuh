// Attention of up to kMmaHeads query heads over one chunk of tokens by one block: each warp attends to its share of the
// tokens by itself, then the warps meet. Scores stay as the dot products left them and only their differences are
// scaled, so that large logits lose nothing. What sparse_decode and decode_step share.
//
// A token is given by the physical page it is in and its place there.
#pragma once

#include <cstddef>

#include "async_rows.cuh"
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

// The query heads of a block: head h of `heads` is at data + h * stride, and all read KV head kv_head.
template <class T>
struct QueryTile {
  const T* data;
  int64_t stride;
  int heads, kv_head;
};

// fp16 and bf16 on the tensor cores. Lane i and i + 16 of a warp look up its token i. Keys and values come by way of
// shared memory, copied while the warp works on the chunk before: two slots a warp for keys, by turns, and one for
// values. Where the keys were, the warp's result is left.
template <class T, int D>
struct MmaAttend {
  using Element = T;
  static constexpr int kWarps = 8, kThreads = kWarps * kWarpSize;
  static constexpr int kTokens = kChunkTokens / kWarps;
  static_assert(kTokens == kMmaRows);
  static constexpr int kMaxD = D;
  static constexpr int kRowBytes = D * sizeof(T), kSlotBytes = kTokens * kRowBytes;
  static_assert(kMmaHeads * D * sizeof(float) <= kSlotBytes);
  using Keys = RowSlot<kRowBytes, ReadBy::row>;
  using Values = RowSlot<kRowBytes, ReadBy::token>;
  struct Shared {};

  static constexpr int shared_bytes(int) { return 3 * kWarps * kSlotBytes; }

  RowPieces<D> query;
  std::byte* const memory;

  __device__ __forceinline__ MmaAttend(int, Shared&, std::byte* dynamic) : memory(dynamic) {}

  __device__ __forceinline__ void load_query(const QueryTile<T>& q) {
    const int r = threadIdx.x % kWarpSize / 4;
    query.load(r < q.heads ? q.data + r * q.stride : nullptr);
  }

  __device__ __forceinline__ std::byte* slot(int i) const {
    return memory + (i * kWarps + threadIdx.x / kWarpSize) * kSlotBytes;
  }

  // page: of this lane's token; first: the place of the warp's token i is (first + i) % page_size.
  __device__ __forceinline__ void copy_keys(
      const Cache& k, int kv_head, int page, int first, int page_size, int turn) const {
    Keys::copy(slot(turn), own_row(k, kv_head, page, first, page_size), k.data);
  }
  __device__ __forceinline__ void copy_values(const Cache& v, int kv_head, int page, int first, int page_size) const {
    Values::copy(slot(2), own_row(v, kv_head, page, first, page_size), v.data);
  }
  static __device__ __forceinline__ const T* own_row(
      const Cache& cache, int kv_head, int page, int first, int page_size) {
    return token_row<T>(cache, page, kv_head, (first + static_cast<int>(threadIdx.x % kTokens)) & (page_size - 1));
  }

  // What the warps leave for ChunkMerge: [kWarps] of [heads, D], so many floats apart.
  __device__ __forceinline__ float* results(int turn) const {
    return reinterpret_cast<float*>(memory + turn * kWarps * kSlotBytes);
  }
  __device__ __forceinline__ int results_stride(int, int) const { return kSlotBytes / sizeof(float); }

  // The groups of copies are, from the latest: keys of the next chunk, values of this one, its keys.
  __device__ __forceinline__ void attend(
      const Softmax& softmax, const Cache&, const Cache&, const QueryTile<T>& q, int page, int, int, int turn,
      float* max_out, float* sum_out, Shared&) {
    const int lane = threadIdx.x % kWarpSize, r = lane / 4, c = lane % 4;
    float score[4] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {};
    wait_copies<2>();
    {
      RowPieces<D> keys[2];
#pragma unroll
      for (int i = 0; i < RowPieces<D>::kCount; ++i) {
        keys[0].at[i] = Keys::read(slot(turn), r, 4 * i + c);
        keys[1].at[i] = Keys::read(slot(turn), r + 8, 4 * i + c);
      }
      dot<T>(score, keys[0], keys[1], query);
    }
    const float bias = token_bias(page);
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
    wait_copies<1>();
    OutTile<D> tile_out;
    {
      ValuePieces<D> values;
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int i = 0; i < ValuePieces<D>::kCount; ++i)
          values.at[j][i] = Values::read(slot(2), 2 * c + j % 2 + j / 2 * 8, 8 * i + r);
      tile_out.template add<T>(values, score);
    }
#pragma unroll
    for (int step = 4; step < kWarpSize; step *= 2)
#pragma unroll
      for (int e = 0; e < 2; ++e) sum[e] += __shfl_xor_sync(kFullMask, sum[e], step);

    if (r == 0)
#pragma unroll
      for (int e = 0; e < 2; ++e) max_out[2 * c + e] = top[e], sum_out[2 * c + e] = sum[e];
    float* const out = results(turn) + threadIdx.x / kWarpSize * results_stride(0, 0);
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
    __syncwarp();  // both slots may be copied to anew: the keys' after the merge
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

  static constexpr int shared_bytes(int D) { return kWarps * kMmaHeads * D * static_cast<int>(sizeof(float)); }

  const int D;
  Shared& shared;
  float* const memory;

  __device__ __forceinline__ SimtAttend(int head_dim, Shared& s, std::byte* dynamic)
      : D(head_dim), shared(s), memory(reinterpret_cast<float*>(dynamic)) {}

  __device__ __forceinline__ void load_query(const QueryTile<T>& q) {
    for (int x = threadIdx.x; x < kMmaHeads * D; x += kThreads)
      shared.query[x / D][x % D] = x / D < q.heads ? to_float(q.data[x / D * q.stride + x % D]) : 0.f;
    __syncthreads();
  }

  __device__ __forceinline__ void copy_keys(const Cache&, int, int, int, int, int) const {}
  __device__ __forceinline__ void copy_values(const Cache&, int, int, int, int) const {}
  __device__ __forceinline__ float* results(int) const { return memory; }
  __device__ __forceinline__ int results_stride(int heads, int head_dim) const { return heads * head_dim; }

  __device__ __forceinline__ void attend(
      const Softmax& softmax, const Cache& k, const Cache& v, const QueryTile<T>& q, int page, int first, int page_size,
      int, float* max_out, float* sum_out, Shared&) {
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int slot = (first + lane) & (page_size - 1);
    float* const out = memory + warp * results_stride(q.heads, D);
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
  static_assert(kWarpSize % kHeadThreads == 0 && kHeadThreads % Attend::kWarps == 0);
  static constexpr int kColumns = (Attend::kMaxD / 4 + kHeadThreads - 1) / kHeadThreads;
  using Chunk = Partial<kColumns>;

  static __device__ __forceinline__ int head() { return threadIdx.x / kHeadThreads; }
  static __device__ __forceinline__ int first_head() { return threadIdx.x / kWarpSize * kWarpSize / kHeadThreads; }
  static __device__ __forceinline__ int first_column() { return threadIdx.x % kHeadThreads; }

  // warp_out: [kWarps] of [heads, D], stride apart. By whole warps: what those past the last head get is of no use.
  static __device__ __forceinline__ Chunk
  merge(const Softmax& softmax, const WarpResults<Attend::kWarps>& results, const float* warp_out, int stride, int D) {
    Chunk chunk;
    // A lane weighs one warp.
    const int lane = threadIdx.x % kWarpSize, own = lane % Attend::kWarps;
    const float max = results.max[own][head()];
    chunk.top = max;
#pragma unroll
    for (int step = 1; step < Attend::kWarps; step *= 2)
      chunk.top = fmaxf(chunk.top, __shfl_xor_sync(kFullMask, chunk.top, step));
    const float own_weight = softmax.weight(max, chunk.top);
    float weight[Attend::kWarps];
#pragma unroll
    for (int w = 0; w < Attend::kWarps; ++w) {
      weight[w] = __shfl_sync(kFullMask, own_weight, lane - own + w);
      chunk.sum = __fmaf_rn(weight[w], results.sum[w][head()], chunk.sum);
    }
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const int column = first_column() + i * kHeadThreads;
      if (column * 4 >= D) continue;
      float4& x = chunk.out[i];
#pragma unroll
      for (int w = 0; w < Attend::kWarps; ++w) {
        const float4 y = reinterpret_cast<const float4*>(warp_out + w * stride + head() * D)[column];
        x.x = __fmaf_rn(weight[w], y.x, x.x), x.y = __fmaf_rn(weight[w], y.y, x.y);
        x.z = __fmaf_rn(weight[w], y.z, x.z), x.w = __fmaf_rn(weight[w], y.w, x.w);
      }
    }
    return chunk;
  }
};

// The chunks of tokens [first, end) of a list by a block, one after the other: keys and values of one are there or on
// their way, and the keys of the next. find(offset): the page of this lane's token of the chunk at first + offset,
// asked for one chunk ahead of its copies; take(chunk, merged): what came of the chunk that many chunks from the first
// on.
template <class Attend, class Find, class Take>
__device__ __forceinline__ void attend_chunks(
    Attend& tokens, const Softmax& softmax, const Cache& k, const Cache& v,
    const QueryTile<typename Attend::Element>& query, int D, int first, int end, int page_size,
    WarpResults<Attend::kWarps>& results, typename Attend::Shared& shared, Find&& find, Take&& take) {
  using Merge = ChunkMerge<Attend>;
  const int warp = threadIdx.x / kWarpSize, warp_token = first + warp * Attend::kTokens;
  int page = kNoToken, next = find(0);
#pragma unroll 1
  for (int offset = -kChunkTokens; first + offset < end; offset += kChunkTokens) {
    const int coming = offset + kChunkTokens, turn = coming / kChunkTokens % 2;
    const bool more = first + coming < end;
    if (more) tokens.copy_keys(k, query.kv_head, next, warp_token + coming, page_size, turn);
    end_copies();
    const int after = first + coming + kChunkTokens < end ? find(coming + kChunkTokens) : kNoToken;
    if (offset >= 0)
      tokens.attend(
          softmax, k, v, query, page, warp_token + offset, page_size, turn ^ 1, results.max[warp], results.sum[warp],
          shared);
    if (more) tokens.copy_values(v, query.kv_head, next, warp_token + coming, page_size);
    end_copies();
    if (offset >= 0) {
      __syncthreads();
      if (Merge::first_head() < query.heads) {
        const typename Merge::Chunk merged =
            Merge::merge(softmax, results, tokens.results(turn ^ 1), tokens.results_stride(query.heads, D), D);
        if (Merge::head() < query.heads) take(offset / kChunkTokens, merged);
      }
      __syncthreads();
    } else {
      tokens.load_query(query);
    }
    page = next, next = after;
  }
}

}  // namespace quest::cuda
