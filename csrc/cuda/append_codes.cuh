// append_codes: a warp encodes one new key of one head. Element d of the key is in lane d % 32, so that the rotation
// and the sum of squares are shuffles. The CPU has the same order of additions, and so the same bits.
#pragma once

#include "../key_codes.h"
#include "core/elements.cuh"
#include "core/ptx.cuh"

namespace quest::cuda {

constexpr int kCodesThreads = 128, kCodesWarps = kCodesThreads / kWarpSize;

template <int D>
struct EncodedKey {
  static constexpr int kLanes = (D + kWarpSize - 1) / kWarpSize;  // elements of a lane
  float x[kLanes];

  __device__ __forceinline__ void rotate() {
    const int lane = threadIdx.x % kWarpSize;
#pragma unroll
    for (int distance = 1; distance < rotated_block(D); distance *= 2) {
      if (distance < kWarpSize) {
#pragma unroll
        for (int i = 0; i < kLanes; ++i) {
          const float other = __shfl_xor_sync(kFullMask, x[i], distance);
          x[i] = lane & distance ? __fsub_rn(other, x[i]) : __fadd_rn(x[i], other);
        }
      } else {
        const int step = distance / kWarpSize;
#pragma unroll
        for (int i = 0; i < kLanes; ++i) {
          if (i & step) continue;
          const float a = x[i], b = x[i + step];
          x[i] = __fadd_rn(a, b), x[i + step] = __fsub_rn(a, b);
        }
      }
    }
  }

  __device__ __forceinline__ float sum_squares() const {
    constexpr int kAll = kMaxHeadDim / kWarpSize;
    float sums[kAll];
#pragma unroll
    for (int i = 0; i < kAll; ++i) sums[i] = i < kLanes ? __fmul_rn(x[i < kLanes ? i : 0], x[i < kLanes ? i : 0]) : 0.f;
#pragma unroll
    for (int half = kAll / 2; half > 0; half /= 2)
#pragma unroll
      for (int i = 0; i < half; ++i) sums[i] = __fadd_rn(sums[i], sums[i + half]);
#pragma unroll
    for (int step = kWarpSize / 2; step > 0; step /= 2)
      sums[0] = __fadd_rn(sums[0], __shfl_xor_sync(kFullMask, sums[0], step));
    return sums[0];
  }
};

template <class T, int D>
__global__ void __launch_bounds__(kCodesThreads) append_codes_kernel(const AppendCodesParams p) {
  start_next_kernel();  // its blocks take their places now and wait for the writes below
  const int64_t item = int64_t{blockIdx.x} * kCodesWarps + threadIdx.x / kWarpSize;
  const int lane = threadIdx.x % kWarpSize, h = static_cast<int>(item % p.size.Hkv);
  const int64_t token = item / p.size.Hkv;
  const int t = static_cast<int>(token % p.size.T), b = static_cast<int>(token / p.size.T);
  wait_for_previous_kernel();
  if (b >= p.size.B || t >= p.new_tokens(b)) return;
  const int64_t at = int64_t{p.paging.length(b)} + t;
  if (at >= p.paging.capacity()) return;
  const int64_t page = p.paging.physical(b, static_cast<int>(at >> p.paging.page_shift));
  const int64_t slot = at & (p.paging.page_size() - 1);
  if (page < 0) return;

  const T* const from = static_cast<const T*>(p.k.data) + b * p.k.stride_b + t * p.k.stride_t + h * p.k.stride_h;
  EncodedKey<D> key;
#pragma unroll
  for (int i = 0; i < EncodedKey<D>::kLanes; ++i) {
    const int d = i * kWarpSize + lane;
    key.x[i] = d < D ? to_float(from[d]) : 0.f;
  }
  key.rotate();
  const float step = __fmul_rn(__fsqrt_rn(__fdiv_rn(key.sum_squares(), D)), kCodeStep);
  const bool finite = step < INFINITY;
  const KeyCodes& to = p.codes;
  uint8_t* const bytes = to.data + page * to.stride_n + h * to.stride_h + slot * to.stride_s;
#pragma unroll
  for (int i = 0; i < EncodedKey<D>::kLanes; ++i) {
    int byte = finite ? key_code(key.x[i], step) << lane % 4 * 2 : 0;
    byte |= __shfl_xor_sync(kFullMask, byte, 1);
    byte |= __shfl_xor_sync(kFullMask, byte, 2);
    const int d = i * kWarpSize + lane;
    if (lane % 4 == 0 && d < D) bytes[d / 4] = static_cast<uint8_t>(byte);
  }
  if (lane == 0)
    to.scales[page * to.scales_stride_n + h * to.scales_stride_h + slot * to.scales_stride_s] =
        finite ? __fmul_rn(step, 0.5f * static_cast<float>(rotation_scale(D))) : NAN;
}

}  // namespace quest::cuda
