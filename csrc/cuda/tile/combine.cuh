// The final pass over partials: one block merges those of a row's heads into the row's result.
#pragma once

#include "softmax_state.cuh"

namespace quest::cuda {

constexpr int kCombineThreads = 256;

// The scratch memory of a split attention: one softmax state for each query head and partial. A partial is a tile, or a
// supertile whose tiles its block has merged already.
struct Partials {
  float* out = nullptr;       // [query heads, count, D]
  float2* max_sum = nullptr;  // [query heads, count]
  int32_t count = 1;          // of a row at most
  int32_t tiles = 1;          // in each: 1 or kSupertile

  __host__ __device__ int per_supertile() const { return kSupertile / tiles; }

  __device__ __forceinline__ void store(int64_t head, int partial, int D, int vec, float4 values) const {
    __stcg(reinterpret_cast<float4*>(out + (head * count + partial) * D) + vec, values);
  }
  __device__ __forceinline__ void store(int64_t head, int partial, float max, float sum) const {
    __stcg(max_sum + head * count + partial, float2{max, sum});
  }
};

template <class T, int D>
struct Combine {
  Partials partials;
  int64_t first_head;  // of the row, among all query heads
  int heads, count;    // query heads of the row; partials that it has
  float scale;
  T* out;      // [heads, D]
  float* lse;  // [heads]

  // A slice is every kSlices-th supertile. Slices merge in parallel, then in order. kLanes lanes take a slice.
  static constexpr int kVecs = D / 4, kSlices = kCombineThreads / kVecs;
  static constexpr int kLanes = kVecs <= kWarpSize / 2 ? kWarpSize / 2 : kWarpSize;
  static constexpr int kPasses = (kVecs + kLanes - 1) / kLanes, kUnits = kCombineThreads / kLanes;
  static_assert(kUnits % kPasses == 0 && kLanes >= 2 * kSupertile);

  template <int kHeads>
  struct Shared {
    float4 values[kHeads][kSlices][kVecs];
    float2 max_sum[kHeads][kSlices];
  };

  // Merges `n` partials of a head into `total`, for one vector by each lane. The lanes share out the weights: each lane
  // computes one weight of SoftmaxState::merge() for all vectors.
  __device__ __forceinline__ SoftmaxState<1> merge_partials(
      SoftmaxState<1> total, int head, int first, int stride, int n, int vec, const Softmax& softmax) const {
    const int lane = threadIdx.x % kLanes, partial = lane / 2;
    const unsigned lanes = kLanes == kWarpSize ? kFullMask : 0xffffu << threadIdx.x % kWarpSize / kLanes * kLanes;
    const int64_t base = (first_head + head) * partials.count + first;
    float2 own{-INFINITY, 0.f};
    if (partial < n) own = __ldcg(partials.max_sum + base + partial * stride);
    float4 values[kSupertile];
#pragma unroll
    for (int i = 0; i < kSupertile; ++i)
      if (i < n && vec < kVecs)
        values[i] = __ldcg(reinterpret_cast<const float4*>(partials.out + (base + i * stride) * D) + vec);
    float both = fmaxf(total.max, own.x);  // the maximum up to this lane's partial
#pragma unroll
    for (int step = 2; step < 2 * kSupertile; step *= 2) {
      const float other = __shfl_up_sync(lanes, both, step, kLanes);
      if (lane >= step) both = fmaxf(both, other);
    }
    const float before = __shfl_up_sync(lanes, both, 2, kLanes);
    // Even lanes weigh the state so far, odd lanes the partial.
    const float weight = softmax.weight(lane % 2 ? own.x : lane ? before : total.max, both);
#pragma unroll
    for (int i = 0; i < kSupertile; ++i) {
      if (i >= n) break;
      total.blend(
          __shfl_sync(lanes, weight, 2 * i, kLanes), __shfl_sync(lanes, weight, 2 * i + 1, kLanes),
          __shfl_sync(lanes, own.y, 2 * i, kLanes), &values[i]);
    }
    total.max = __shfl_sync(lanes, both, 2 * n - 2, kLanes);
    return total;
  }

  // By a block of kCombineThreads: kLanes lanes take a slice of a head, and as many vectors.
  template <int kHeads>
  static __device__ __forceinline__ void run(const Combine& row, Shared<kHeads>& shared) {
    const int lane = threadIdx.x % kLanes, first_unit = threadIdx.x / kLanes;
    const int per_supertile = row.partials.per_supertile();
    const int supertiles = (row.count + per_supertile - 1) / per_supertile, slices = max(1, min(kSlices, supertiles));
    const Softmax softmax(row.scale);
#pragma unroll 1
    for (int unit = first_unit, h = 0, slice = first_unit / kPasses;; unit += kUnits, slice += kUnits / kPasses) {
      for (; slice >= slices; slice -= slices) ++h;
      if (h >= row.heads) break;
      const int vec = unit % kPasses * kLanes + lane;
      SoftmaxState<1> total;
      // Supertiles that are one partial merge like the tiles of one supertile: several loads wait together.
      const bool single = per_supertile == 1;
      const int stride = single ? slices : 1;
#pragma unroll 1
      for (int supertile = slice; supertile < supertiles; supertile += single ? kSupertile * slices : slices) {
        const int first = supertile * per_supertile;
        const int n = min(kSupertile, single ? (supertiles - supertile + slices - 1) / slices : row.count - first);
        const SoftmaxState<1> next =
            row.merge_partials(single ? total : SoftmaxState<1>{}, h, first, stride, n, vec, softmax);
        if (single)
          total = next;
        else
          total.merge(next, softmax);
      }
      if (vec < kVecs) shared.values[h][slice][vec] = total.out[0];
      if (vec == 0) shared.max_sum[h][slice] = {total.max, total.sum};
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < row.heads * kVecs; i += kCombineThreads) {
      const int vec = i % kVecs, h = i / kVecs;
      SoftmaxState<1> total;
#pragma unroll 1
      for (int s = 0; s < slices; ++s) {
        const float2 max_sum = shared.max_sum[h][s];
        total.merge({max_sum.x, max_sum.y, {shared.values[h][s][vec]}}, softmax);
      }
      total.write(row.out + h * D + vec * 4, 0);
      if (vec == 0) row.lse[h] = total.lse(softmax);
    }
    __syncthreads();
  }
};

}  // namespace quest::cuda
