// An online softmax: weights from scores, and states over disjoint tokens that merge into one.
#pragma once

#include "../core/elements.cuh"
#include "../core/ptx.cuh"

namespace quest::cuda {

constexpr float kLog2e = 1.4426950408889634f;

// Turns scores into weights. Scores are multiplied by the scale's sign first, so that the largest has weight 1.
struct Softmax {
  float sign, scale, log2_scale;  // sign is 0 for a scale of 0: infinite scores become NaN, as in the reference
  __device__ explicit Softmax(float s)
      : sign(
            s < 0.f   ? -1.f
            : s > 0.f ? 1.f
                      : 0.f),
        scale(fabsf(s)),
        log2_scale(scale * kLog2e) {}
  // A score of -inf has weight 0 whatever the maximum is.
  __device__ __forceinline__ float weight(float score, float max) const {
    const float weight = exp2_approx((score - max) * log2_scale);
    return score == -INFINITY ? 0.f : weight;
  }
};

// The softmax of one head over some tokens, for kVecs vectors of four head dimensions: the largest score, and relative
// to it the sum of weights and the weighted values. The default is the state of no token: an exact identity of merge().
template <int kVecs>
struct SoftmaxState {
  float max = -INFINITY, sum = 0.f;
  float4 out[kVecs] = {};

  __device__ __forceinline__ void merge(const SoftmaxState& next, const Softmax& softmax) {
    const float both = fmaxf(max, next.max);
    const float a = softmax.weight(max, both), b = softmax.weight(next.max, both);
    max = both;
    blend(a, b, next.sum, next.out);
  }

  // sum and out become a times their own plus b times the other's.
  __device__ __forceinline__ void blend(float a, float b, float other_sum, const float4* other_out) {
    // Rounded as written: kernels that merge must not contract the products in different ways.
    const auto blend = [&](float& x, float y) { x = __fmaf_rn(a, x, __fmul_rn(b, y)); };
    blend(sum, other_sum);
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      blend(out[i].x, other_out[i].x), blend(out[i].y, other_out[i].y);
      blend(out[i].z, other_out[i].z), blend(out[i].w, other_out[i].w);
    }
  }

  // No token, or all of them scored -inf. A NaN score makes the sum NaN, and a score of +inf too.
  __device__ __forceinline__ bool empty() const { return sum == 0.f; }
  __device__ __forceinline__ float lse(const Softmax& softmax) const {
    if (empty()) return -INFINITY;
    return max == INFINITY ? INFINITY : max * softmax.scale + logf(sum);
  }

  // The attention output of vector i.
  template <class T>
  __device__ __forceinline__ void write(T* to, int i) const {
    const float4 x = empty() ? float4{} : out[i];  // out is not zero where a weight of 0 met an infinite value
    const float inverse = empty() ? 0.f : 1.f / sum;
    to[0] = from_float<T>(x.x * inverse), to[1] = from_float<T>(x.y * inverse);
    to[2] = from_float<T>(x.z * inverse), to[3] = from_float<T>(x.w * inverse);
  }
};

// The order of summation is fixed, so that a result depends on the list of pages alone, not on batch or capacity.
// A tile is kTileTokens consecutive tokens of the list, a supertile kSupertile consecutive tiles. The tiles of a
// supertile merge in order; combine.cuh merges the supertiles.
constexpr int kTileTokens = 128;
constexpr int kSupertile = 8;

}  // namespace quest::cuda
