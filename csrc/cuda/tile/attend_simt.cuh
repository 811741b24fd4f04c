// Attention to one tile of tokens in float32, and for caches whose strides forbid 16-byte loads.
#pragma once

#include "attend.cuh"

namespace quest::cuda {

// A lane owns a key for the scores, then a head dimension for the values.
template <class T>
struct SimtAttend {
  using Element = T;
  static constexpr int kWarps = 4, kThreads = kWarps * kWarpSize;
  static constexpr int kTokens = kTileTokens / kWarps;
  static_assert(kTokens == kWarpSize);
  static constexpr int kMaxD = kMaxHeadDim;
  struct Shared {
    float query[kHeadTile][kMaxHeadDim];
    float weight[kWarps][kHeadTile][kTokens];
  };

  static constexpr int shared_bytes(int D) { return kWarps * kHeadTile * D * static_cast<int>(sizeof(float)); }

  const int D;
  Shared& shared;
  float* const memory;

  __device__ __forceinline__ SimtAttend(int head_dim, Shared& s, std::byte* dynamic)
      : D(head_dim), shared(s), memory(reinterpret_cast<float*>(dynamic)) {}

  __device__ __forceinline__ void load_query(const QueryTile<T>& q) {
    for (int x = threadIdx.x; x < kHeadTile * D; x += kThreads)
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
    // Short sums that add up pairwise, with the rounding error carried along (Kahan): large scores lose nothing.
    float acc[kHeadTile] = {}, carry[kHeadTile] = {};
    const T* const key = token_row<T>(k, page, q.kv_head, slot);
    for (int block = 0; key && block < D; block += kSimtBlock) {
      float sum4[kHeadTile][4] = {};
#pragma unroll
      for (int d = 0; d < kSimtBlock; d += Vec<T>::kSize) {
        const Vec<T> x = load_vec(key + block + d, k.aligned);
#pragma unroll
        for (int j = 0; j < Vec<T>::kSize; ++j)
#pragma unroll
          for (int h = 0; h < kHeadTile; ++h) sum4[h][j % 4] += shared.query[h][block + d + j] * to_float(x.at[j]);
      }
#pragma unroll
      for (int h = 0; h < kHeadTile; ++h) {
        const float next = (sum4[h][0] + sum4[h][1]) + (sum4[h][2] + sum4[h][3]) - carry[h];
        const float sum = acc[h] + next;
        carry[h] = isfinite(sum) ? (sum - acc[h]) - next : 0.f;  // infinite scores stay infinite
        acc[h] = sum;
      }
    }
#pragma unroll
    for (int h = 0; h < kHeadTile; ++h) {
      const float score = acc[h] * softmax.sign + token_bias(page);
      float max = score;
      for (int step = 1; step < kWarpSize; step *= 2) max = fmaxf(max, __shfl_xor_sync(kFullMask, max, step));
      const float weight = softmax.weight(score, max);
      float sum = weight;
      for (int step = 1; step < kWarpSize; step *= 2) sum += __shfl_xor_sync(kFullMask, sum, step);
      shared.weight[warp][h][lane] = weight;
      if (lane == 0) max_out[h] = max, sum_out[h] = sum;
    }
    __syncwarp();

    for (int first_d = 0; first_d < D; first_d += kWarpSize) {
      const int d = first_d + lane;
      float sums[kHeadTile] = {};
      for (int begin = 0; begin < kTokens; begin += 8) {  // short sums, as in the scores
        float short_sum[kHeadTile] = {};
#pragma unroll
        for (int i = begin; i < begin + 8; ++i) {
          const T* const value =
              token_row<T>(v, __shfl_sync(kFullMask, page, i), q.kv_head, (first + i) & (page_size - 1));
          const float x = value && d < D ? to_float(value[d]) : 0.f;
#pragma unroll
          for (int h = 0; h < kHeadTile; ++h) short_sum[h] += shared.weight[warp][h][i] * x;
        }
#pragma unroll
        for (int h = 0; h < kHeadTile; ++h) sums[h] += short_sum[h];
      }
#pragma unroll
      for (int h = 0; h < kHeadTile; ++h)
        if (d < D && h < q.heads) out[h * D + d] = sums[h];
    }
    __syncwarp();
  }
};

}  // namespace quest::cuda
