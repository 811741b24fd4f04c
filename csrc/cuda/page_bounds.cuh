// The elementwise minimum and maximum of the keys of one page and head, by one block: the part that append_kv and
// update_bounds share. A thread keeps one vector of head dimensions and every `rows`-th token; the rows then meet in
// shared memory. NaN keys give NaN bounds, so that a broken page is seen and not skipped.
#pragma once

#include "elements.cuh"

namespace quest::cuda {

constexpr int kBoundsThreads = 128;

template <class T>
struct PageBounds {
  static constexpr int kVec = Vec<T>::kSize;
  int vecs, rows, vec, row;  // a row of threads covers head_dim once
  bool active;
  float lower[kVec], upper[kVec];

  __device__ explicit PageBounds(int D) {
    vecs = D / kVec;
    rows = kBoundsThreads / vecs;
    vec = threadIdx.x % vecs;
    row = threadIdx.x / vecs;
    active = row < rows;
#pragma unroll
    for (int i = 0; i < kVec; ++i) lower[i] = INFINITY, upper[i] = -INFINITY;
  }

  __device__ int offset() const { return vec * kVec; }

  __device__ void add(const Vec<T>& key) {
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const float x = to_float(key.at[i]);
      lower[i] = nan_min(lower[i], x);
      upper[i] = nan_max(upper[i], x);
    }
  }

  __device__ void store(const Bounds& bounds, int64_t page, int head) {
    __shared__ float shared[2][kBoundsThreads][kVec];
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      shared[0][threadIdx.x][i] = lower[i];
      shared[1][threadIdx.x][i] = upper[i];
    }
    __syncthreads();
    if (row != 0) return;
    Vec<T> out[2];
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      for (int r = 1; r < rows; ++r) {
        lower[i] = nan_min(lower[i], shared[0][r * vecs + vec][i]);
        upper[i] = nan_max(upper[i], shared[1][r * vecs + vec][i]);
      }
      out[0].at[i] = from_float<T>(lower[i]);
      out[1].at[i] = from_float<T>(upper[i]);
    }
    T* base = static_cast<T*>(bounds.data) + page * bounds.stride_n + head * bounds.stride_h + offset();
    store_vec(base, out[0], bounds.aligned);
    store_vec(base + bounds.stride_c, out[1], bounds.aligned);
  }
};

}  // namespace quest::cuda
