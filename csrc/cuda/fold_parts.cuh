// What the runs of a row leave, folded by one block to the row's result.
#pragma once

#include "softmax.cuh"

namespace quest::cuda {

template <class T, int D>
struct RowParts {
  const float2* sums;  // [parts, heads]: largest score, sum of weights
  const float* outs;   // [parts, heads, D]
  int parts, in_span;  // in_span parts are a span
  int heads;
  float scale;
  T* out;      // [heads, D]
  float* lse;  // [heads]

  static constexpr int kColumns = D / 4, kSlices = kCombineThreads / kColumns;
  static constexpr int kTurns = (kColumns + kWarpSize - 1) / kWarpSize, kWarps = kCombineThreads / kWarpSize;
  static_assert(kWarps % kTurns == 0);
  // Dynamic shared memory for so many heads.
  static constexpr int shared_bytes(int heads) {
    return heads * kSlices * (kColumns * static_cast<int>(sizeof(float4)) + static_cast<int>(sizeof(float2)));
  }

  // So many parts of a head, each `stride` after the one before, folded onto `total` for one column by each lane. The
  // lanes share the weights out: what Partial::fold() would do part by part, each lane does once, for all columns.
  __device__ __forceinline__ Partial<1> fold_parts(
      Partial<1> total, int head, int first, int stride, int count, int column, const Softmax& softmax) const {
    const int lane = threadIdx.x % kWarpSize, part = lane / 2;
    float2 scalars{-INFINITY, 0.f};
    if (part < count) scalars = __ldcg(sums + (first + part * stride) * heads + head);
    float4 values[kSpanChunks];
#pragma unroll
    for (int i = 0; i < kSpanChunks; ++i)
      if (i < count && column < kColumns)
        values[i] = __ldcg(reinterpret_cast<const float4*>(outs + ((first + i * stride) * heads + head) * D) + column);
    float both = fmaxf(total.top, scalars.x);  // the largest up to this part
#pragma unroll
    for (int step = 2; step < 2 * kSpanChunks; step *= 2) {
      const float other = __shfl_up_sync(kFullMask, both, step);
      if (lane >= step) both = fmaxf(both, other);
    }
    const float before = __shfl_up_sync(kFullMask, both, 2);
    // Even lanes weigh what is folded so far, odd ones the part.
    const float weight = softmax.weight(lane % 2 ? scalars.x : lane ? before : total.top, both);
#pragma unroll
    for (int i = 0; i < kSpanChunks; ++i) {
      if (i >= count) break;
      total.mix(
          __shfl_sync(kFullMask, weight, 2 * i), __shfl_sync(kFullMask, weight, 2 * i + 1),
          __shfl_sync(kFullMask, scalars.y, 2 * i), &values[i]);
    }
    total.top = __shfl_sync(kFullMask, both, 2 * count - 2);
    return total;
  }

  // By a block of kCombineThreads, which has no other use for its dynamic shared memory: a warp takes a slice of a
  // head's spans, and up to 32 columns.
  static __device__ __forceinline__ void fold(const RowParts& row) {
    extern __shared__ __align__(16) std::byte memory[];
    float4* const values = reinterpret_cast<float4*>(memory);  // [heads, slices, kColumns]
    float2* const scalars = reinterpret_cast<float2*>(values + row.heads * kSlices * kColumns);  // [heads, slices]
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    const int spans = (row.parts + row.in_span - 1) / row.in_span, slices = min(kSlices, spans);
    const Softmax softmax(row.scale);
#pragma unroll 1
    for (int unit = warp, h = 0, slice = warp / kTurns;; unit += kWarps, slice += kWarps / kTurns) {
      for (; slice >= slices; slice -= slices) ++h;
      if (h >= row.heads) break;
      const int column = unit % kTurns * kWarpSize + lane;
      Partial<1> total;
      // Spans of one part are folded as the parts of one span are, several at a time.
      const bool single = row.in_span == 1;
      const int stride = single ? slices : 1;
#pragma unroll 1
      for (int span = slice; span < spans; span += single ? kSpanChunks * slices : slices) {
        const int first = span * row.in_span;
        const int count = min(kSpanChunks, single ? (spans - span + slices - 1) / slices : row.parts - first);
        const Partial<1> next = row.fold_parts(single ? total : Partial<1>{}, h, first, stride, count, column, softmax);
        if (single)
          total = next;
        else
          total.fold(next, softmax);
      }
      if (column < kColumns) values[(h * slices + slice) * kColumns + column] = total.out[0];
      if (column == 0) scalars[h * slices + slice] = {total.top, total.sum};
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < row.heads * kColumns; i += kCombineThreads) {
      const int column = i % kColumns, h = i / kColumns;
      Partial<1> total;
#pragma unroll 1
      for (int s = 0; s < slices; ++s) {
        const float2 scalar = scalars[h * slices + s];
        total.fold({scalar.x, scalar.y, {values[(h * slices + s) * kColumns + column]}}, softmax);
      }
      total.write(row.out + h * D + column * 4, 0);
      if (column == 0) row.lse[h] = total.lse(softmax);
    }
    __syncthreads();
  }
};

}  // namespace quest::cuda
