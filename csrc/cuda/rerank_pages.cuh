// rerank_pages: scores of listed pages from the codes of their tokens.
//
// A block takes some entries of a list and up to eight of the query heads that share it. Its warps score kPassTokens
// tokens at a time, and then a thread for each page and head reduces the scores of the page's tokens. In fp16 and bf16
// the tensor cores multiply, by the layout of tile/mma_rows.cuh: codes are unpacked exactly, and scaled afterwards.
#pragma once

#include "../key_codes.h"
#include "core/ptx.cuh"
#include "tile/list_tile.cuh"
#include "tile/mma_rows.cuh"
#include "tile/softmax_state.cuh"

namespace quest::cuda {

constexpr int kRerankThreads = 256, kRerankWarps = kRerankThreads / kWarpSize;
constexpr int kPassTokens = kRerankWarps * kMmaRows;  // at least the largest page
constexpr int kRerankPasses = 4;                      // of a block; their codes are loaded together
constexpr int kRerankTokens = kPassTokens * kRerankPasses;

struct RerankKernelParams {
  RerankParams op;
  int32_t splits;  // of a list, kRerankTokens tokens each
};

struct FillParams {
  float* scores;
  int64_t count;
};
static __global__ void __launch_bounds__(kRerankThreads) fill_scores_kernel(const FillParams p) {
  start_next_kernel();
  wait_for_previous_kernel();
  for (int64_t i = int64_t{blockIdx.x} * kRerankThreads + threadIdx.x; i < p.count; i += gridDim.x * kRerankThreads)
    p.scores[i] = -INFINITY;
}

struct RerankTile : ListTile {
  int first_entry;
  __device__ explicit RerankTile(const RerankKernelParams& params)
      : ListTile(params), first_entry(split * (kRerankTokens >> params.op.paging.page_shift)) {}
};

// A token of a list: where its code is, and whether it is one of the sequence.
struct ListedToken {
  const uint8_t* codes = nullptr;
  float scale = 0.f;
  int page = -1;  // logical, -1 where there is nothing to score

  __device__ __forceinline__ static ListedToken find(const RerankParams& p, const RerankTile& tile, int token) {
    ListedToken found;
    const int entry = tile.first_entry + (token >> p.paging.page_shift), slot = token & (p.paging.page_size() - 1);
    if (entry >= p.pages.K) return found;
    const int page = p.pages.of(tile.b, tile.t, tile.list)[entry];
    if (page < 0 || page >= p.paging.P || (page << p.paging.page_shift) + slot >= tile.visible) return found;
    found.page = page;
    const int64_t physical = p.paging.physical(tile.b, page);
    found.scale = NAN;  // of a page that the table does not have
    if (physical < 0) return found;
    const KeyCodes& c = p.codes;
    found.codes = c.data + physical * c.stride_n + tile.kv_head * c.stride_h + slot * c.stride_s;
    found.scale =
        __ldg(c.scales + physical * c.scales_stride_n + tile.kv_head * c.scales_stride_h + slot * c.scales_stride_s);
    return found;
  }
};

// Rotated query heads, float32. By all threads; the last rows of fewer than eight heads are zeros.
template <class T, int D>
__device__ __forceinline__ void rotate_queries(
    const RerankParams& p, const RerankTile& tile, float (&query)[kMmaHeads][D]) {
  for (int i = threadIdx.x; i < kMmaHeads * D; i += kRerankThreads) {
    const int h = i / D;
    const T* const row = static_cast<const T*>(p.q.data) + tile.b * p.q.stride_b + tile.t * p.q.stride_t +
                         (tile.first_head + h) * p.q.stride_h;
    query[h][i % D] = h < tile.heads ? to_float(row[i % D]) * static_cast<float>(rotation_scale(D)) : 0.f;
  }
  for (int distance = 1; distance < rotated_block(D); distance *= 2) {
    __syncthreads();
    for (int i = threadIdx.x; i < kMmaHeads * D / 2; i += kRerankThreads) {
      const int pair = i % (D / 2), d = pair / distance * 2 * distance + pair % distance;
      float* const x = query[i / (D / 2)] + d;
      const float a = x[0], b = x[distance];
      x[0] = a + b, x[distance] = a - b;
    }
  }
  __syncthreads();
}

// Elements j and j + 8 of sixteen codes as a pair of T: the levels -3, -1, 1 and 3. The code becomes the low mantissa
// bits of a T with a known offset, which is then subtracted.
template <class T>
__device__ __forceinline__ uint32_t unpack_codes(uint32_t codes, int j) {
  const uint32_t bits = (j == 0 ? codes << 1 : codes >> (2 * j - 1)) & 0x00060006u;
  if constexpr (std::is_same_v<T, __half>) {
    const uint32_t x = bits | 0x64006400u;
    const __half2 y = __hsub2(reinterpret_cast<const __half2&>(x), __float2half2_rn(1024.f + 3.f));
    return reinterpret_cast<const uint32_t&>(y);
  } else {
    const uint32_t x = bits | 0x43004300u;
    const __nv_bfloat162 y = __hsub2(reinterpret_cast<const __nv_bfloat162&>(x), __float2bfloat162_rn(128.f + 3.f));
    return reinterpret_cast<const uint32_t&>(y);
  }
}

// Scores of a pass's tokens by the tensor cores. D is a power of two; lane c of four has D / 4 elements of a row.
template <class T, int D>
struct MmaCodes {
  static constexpr int kWords = D / 64;
  uint32_t query[kWords][8];
  uint32_t low[kRerankPasses][kWords], high[kRerankPasses][kWords];  // codes of tokens r and r + 8

  __device__ __forceinline__ void load_query(const float (&rotated)[kMmaHeads][D]) {
    const int lane = threadIdx.x % kWarpSize;
    const float* const row = rotated[lane / 4] + lane % 4 * (D / 4);
#pragma unroll
    for (int w = 0; w < kWords; ++w)
#pragma unroll
      for (int j = 0; j < 8; ++j) query[w][j] = pack<T>(row[16 * w + j], row[16 * w + j + 8]);
  }
  static __device__ __forceinline__ void load(uint32_t (&to)[kWords], const uint8_t* row) {
    const uint32_t* const from = reinterpret_cast<const uint32_t*>(row + threadIdx.x % 4 * (D / 16));
#pragma unroll
    for (int w = 0; w < kWords; ++w) to[w] = row ? __ldg(from + w) : 0;
  }
  // Lanes i and i + 16 have the address of token i.
  __device__ __forceinline__ void load(int pass, const uint8_t* codes) {
    const int r = threadIdx.x % kWarpSize / 4;
    const uint64_t address = reinterpret_cast<uint64_t>(codes);
    load(low[pass], reinterpret_cast<const uint8_t*>(__shfl_sync(kFullMask, address, r)));
    load(high[pass], reinterpret_cast<const uint8_t*>(__shfl_sync(kFullMask, address, r + 8)));
  }
  // scores[token][head] of the warp's sixteen tokens.
  __device__ __forceinline__ void score(int pass, float scale, float (*scores)[kMmaHeads]) const {
    const int lane = threadIdx.x % kWarpSize, r = lane / 4, c = lane % 4;
    float acc[4] = {};
#pragma unroll
    for (int w = 0; w < kWords; ++w)
#pragma unroll
      for (int j = 0; j < 8; j += 2)
        mma<T>(
            acc, unpack_codes<T>(low[pass][w], j), unpack_codes<T>(high[pass][w], j),
            unpack_codes<T>(low[pass][w], j + 1), unpack_codes<T>(high[pass][w], j + 1), query[w][j], query[w][j + 1]);
#pragma unroll
    for (int e = 0; e < 4; ++e)
      scores[r + e / 2 * 8][2 * c + e % 2] = acc[e] * __shfl_sync(kFullMask, scale, r + e / 2 * 8);
  }
};

// The score of a page from those of its first n tokens, for one head.
__device__ __forceinline__ float reduce_tokens(
    const float (*scores)[kMmaHeads], int head, int n, TokenReduce how, float scale) {
  float most = -INFINITY;
  for (int i = 0; i < n; ++i) most = nan_max(most, scores[i][head]);
  if (how == TokenReduce::max || !(fabsf(most) < INFINITY)) return most;
  float sum = 0.f;
  for (int i = 0; i < n; ++i) sum += exp2f((scores[i][head] - most) * (scale * kLog2e));
  return most + logf(sum) / scale;
}

template <class T, int D, bool kMma>
__global__ void __launch_bounds__(kRerankThreads) rerank_kernel(const RerankKernelParams params) {
  __shared__ float query[kMmaHeads][D];
  __shared__ float scores[kPassTokens][kMmaHeads];
  const RerankParams& p = params.op;
  RerankTile tile(params);
  wait_for_previous_kernel();
  tile.read_length(p);
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize, page_size = p.paging.page_size();
  const int first = warp * kMmaRows + lane % kMmaRows;  // of the warp's tokens in a pass

  ListedToken tokens[kRerankPasses];
#pragma unroll
  for (int pass = 0; pass < kRerankPasses; ++pass)
    tokens[pass] = ListedToken::find(p, tile, pass * kPassTokens + first);
  MmaCodes<T, kMma ? D : 64> codes;
  if constexpr (kMma)
#pragma unroll
    for (int pass = 0; pass < kRerankPasses; ++pass) codes.load(pass, tokens[pass].codes);
  rotate_queries<T, D>(p, tile, query);
  if constexpr (kMma) codes.load_query(query);

#pragma unroll
  for (int pass = 0; pass < kRerankPasses; ++pass) {
    if constexpr (kMma) {
      codes.score(pass, tokens[pass].scale, scores + warp * kMmaRows);
    } else {
      // Lanes i and i + 16 take the heads of token i by turns.
      const ListedToken& token = tokens[pass];
      for (int h = lane / kMmaRows; h < kMmaHeads; h += kWarpSize / kMmaRows) {
        float score = 0.f;
        for (int i = 0; token.codes && i < D / 4; ++i) {
          const int byte = token.codes[i];
          float sum = 0.f;
#pragma unroll
          for (int j = 0; j < 4; ++j) sum += query[h][4 * i + j] * static_cast<float>(2 * (byte >> 2 * j & 3) - 3);
          score += sum;
        }
        scores[first][h] = score * token.scale;
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < (kPassTokens >> p.paging.page_shift) * kMmaHeads; i += kRerankThreads) {
      const int h = i % kMmaHeads, in_pass = i / kMmaHeads;
      const int entry = tile.first_entry + pass * (kPassTokens >> p.paging.page_shift) + in_pass;
      if (h >= tile.heads || entry >= p.pages.K) continue;
      const int page = p.pages.of(tile.b, tile.t, tile.list)[entry];
      if (page < 0 || page >= p.paging.P) continue;
      const int n = min(page_size, tile.visible - (page << p.paging.page_shift));
      if (n <= 0) continue;
      const int64_t row = (int64_t{tile.b} * p.size.T + tile.t) * p.size.Hq + tile.first_head + h;
      p.scores[row * p.paging.P + page] = reduce_tokens(scores + in_pass * page_size, h, n, p.reduce, p.scale);
    }
    __syncthreads();
  }
  start_next_kernel();
}

}  // namespace quest::cuda
