// Element types, their conversions and 16-byte vectors.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "../../params.h"

namespace quest::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kSimtBlock = 16;  // dimensions of a short sum; divides every head_dim

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(int8_t x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return __float2bfloat16_rn(x);
  }
}

// Minimum and maximum that propagate NaN, like torch.amin and torch.amax.
__device__ __forceinline__ float nan_min(float a, float b) { return (b < a || b != b) ? b : a; }
__device__ __forceinline__ float nan_max(float a, float b) { return (b > a || b != b) ? b : a; }

// 16 bytes of T in registers.
template <class T>
struct alignas(16) Vec {
  static constexpr int kSize = 16 / sizeof(T);
  T at[kSize];
};

// Element by element where the tensor's base or strides forbid a 16-byte access.
template <class T>
__device__ __forceinline__ Vec<T> load_vec(const T* p, bool aligned) {
  if (aligned) return *reinterpret_cast<const Vec<T>*>(p);
  Vec<T> v;
#pragma unroll
  for (int i = 0; i < Vec<T>::kSize; ++i) v.at[i] = p[i];
  return v;
}

template <class T>
__device__ __forceinline__ void store_vec(T* p, const Vec<T>& v, bool aligned) {
  if (aligned) {
    *reinterpret_cast<Vec<T>*>(p) = v;
    return;
  }
#pragma unroll
  for (int i = 0; i < Vec<T>::kSize; ++i) p[i] = v.at[i];
}

}  // namespace quest::cuda
