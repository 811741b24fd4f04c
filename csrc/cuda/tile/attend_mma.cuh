// Attention to one tile of tokens in fp16 and bf16 on the tensor cores: each warp attends to its share of the tokens.
#pragma once

#include "async_rows.cuh"
#include "attend.cuh"

namespace quest::cuda {

static_assert(kHeadTile == kMmaHeads);

// Lanes i and i + 16 of a warp look up its token i. A warp has two slots of shared memory for keys and one for values:
// the keys of the next tile and the values of this one are copied while it computes. Its result replaces its keys.
template <class T, int D>
struct MmaAttend {
  using Element = T;
  static constexpr int kWarps = 8, kThreads = kWarps * kWarpSize;
  static constexpr int kTokens = kTileTokens / kWarps;
  static_assert(kTokens == kMmaRows);
  static constexpr int kMaxD = D;
  static constexpr int kRowBytes = D * sizeof(T), kSlotBytes = kTokens * kRowBytes;
  static_assert(kHeadTile * D * sizeof(float) <= kSlotBytes);
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

  // page: of this lane's token; the slot of the warp's token i is (first + i) % page_size.
  __device__ __forceinline__ void copy_keys(
      const Cache& k, int kv_head, int page, int first, int page_size, int stage) const {
    Keys::copy(slot(stage), own_row(k, kv_head, page, first, page_size), k.data);
  }
  __device__ __forceinline__ void copy_values(const Cache& v, int kv_head, int page, int first, int page_size) const {
    Values::copy(slot(2), own_row(v, kv_head, page, first, page_size), v.data);
  }
  static __device__ __forceinline__ const T* own_row(
      const Cache& cache, int kv_head, int page, int first, int page_size) {
    return token_row<T>(cache, page, kv_head, (first + static_cast<int>(threadIdx.x % kTokens)) & (page_size - 1));
  }

  // The warps' outputs for WarpMerge: [kWarps] of [heads, D], results_stride floats apart.
  __device__ __forceinline__ float* results(int stage) const {
    return reinterpret_cast<float*>(memory + stage * kWarps * kSlotBytes);
  }
  __device__ __forceinline__ int results_stride(int, int) const { return kSlotBytes / sizeof(float); }

  // The groups of copies, from the latest: keys of the next tile, values of this tile, its keys.
  __device__ __forceinline__ void attend(
      const Softmax& softmax, const Cache&, const Cache&, const QueryTile<T>& q, int page, int, int, int stage,
      float* max_out, float* sum_out, Shared&) {
    const int lane = threadIdx.x % kWarpSize, r = lane / 4, c = lane % 4;
    float score[4] = {}, max[2] = {-INFINITY, -INFINITY}, sum[2] = {};
    wait_copies<2>();
    {
      RowPieces<D> keys[2];
#pragma unroll
      for (int i = 0; i < RowPieces<D>::kCount; ++i) {
        keys[0].at[i] = Keys::read(slot(stage), r, 4 * i + c);
        keys[1].at[i] = Keys::read(slot(stage), r + 8, 4 * i + c);
      }
      dot<T>(score, keys[0], keys[1], query);
    }
    const float bias = token_bias(page);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      score[e] = score[e] * softmax.sign + __shfl_sync(kFullMask, bias, r + e / 2 * 8);
      max[e % 2] = fmaxf(max[e % 2], score[e]);
    }
#pragma unroll
    for (int step = 4; step < kWarpSize; step *= 2)
#pragma unroll
      for (int e = 0; e < 2; ++e) max[e] = fmaxf(max[e], __shfl_xor_sync(kFullMask, max[e], step));
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      score[e] = softmax.weight(score[e], max[e % 2]);
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
      for (int e = 0; e < 2; ++e) max_out[2 * c + e] = max[e], sum_out[2 * c + e] = sum[e];
    float* const out = results(stage) + threadIdx.x / kWarpSize * results_stride(0, 0);
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
    __syncwarp();  // the values' slot is free now, the keys' after the merge
  }
};

}  // namespace quest::cuda
