// A softmax in parts: weights from scores, and partial results that fold into one another.
#pragma once

#include "elements.cuh"

namespace quest::cuda {

constexpr float kLog2e = 1.4426950408889634f;

// How scores become weights. A negative scale turns the scores round, so that the largest still has weight 1.
struct Softmax {
  float sign, scale, log2_scale;
  __device__ explicit Softmax(float s) : sign(s < 0.f ? -1.f : 1.f), scale(fabsf(s)), log2_scale(scale * kLog2e) {}
  // -inf is no token, whatever the largest score is and even where the scale is 0.
  __device__ __forceinline__ float weight(float score, float top) const {
    float power;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"((score - top) * log2_scale));
    return score == -INFINITY ? 0.f : power;
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
    top = both;
    mix(a, b, next.sum, next.out);
  }

  // a of what there is, and b of another's sum and values.
  __device__ __forceinline__ void mix(float a, float b, float other_sum, const float4* other_out) {
    // Rounded as written: kernels that fold must not contract it in different ways.
    const auto mix = [&](float& x, float y) { x = __fmaf_rn(a, x, __fmul_rn(b, y)); };
    mix(sum, other_sum);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      mix(out[i].x, other_out[i].x), mix(out[i].y, other_out[i].y);
      mix(out[i].z, other_out[i].z), mix(out[i].w, other_out[i].w);
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
    const float share = empty() ? 0.f : 1.f / sum;
    to[0] = from_float<T>(x.x * share), to[1] = from_float<T>(x.y * share);
    to[2] = from_float<T>(x.z * share), to[3] = from_float<T>(x.w * share);
  }
};

// A chunk is kChunkTokens consecutive tokens of a list of pages and a span kSpanChunks consecutive chunks. The chunks
// of a span are folded in order, spans in a fixed order after that; both are constants, so a result depends on the list
// alone, not on the batch, the capacity or how many lists there are.
constexpr int kChunkTokens = 128;
constexpr int kSpanChunks = 8;

// Folds the parts of one head and four of its dimensions; part(i) loads one, and kPartsInSpan of them are a span. The
// spans are folded in so many interleaved slices as combine_slices says, and the slices in order. This is slice
// `slice`.
constexpr int kCombineThreads = 256;
__device__ __forceinline__ int combine_slices(int D) { return kCombineThreads / (D / 4); }

template <int kPartsInSpan, class Load>
__device__ __forceinline__ Partial<1> fold_slice(
    int slice, int slices, int parts, const Softmax& softmax, Load&& part) {
  Partial<1> total;
  constexpr int kBatch = 8 / kPartsInSpan;  // spans that are loaded at once
#pragma unroll 1
  for (int first = slice * kPartsInSpan; first < parts; first += kBatch * slices * kPartsInSpan) {
    Partial<1> loaded[kBatch][kPartsInSpan];
#pragma unroll
    for (int j = 0; j < kBatch; ++j)
#pragma unroll
      for (int i = 0; i < kPartsInSpan; ++i) loaded[j][i] = part(first + j * slices * kPartsInSpan + i);
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      Partial<1> span;
#pragma unroll
      for (int i = 0; i < kPartsInSpan; ++i) span.fold(loaded[j][i], softmax);
      total.fold(span, softmax);
    }
  }
  return total;
}

}  // namespace quest::cuda
