// update_bounds: a block owns one (sequence, head, page) and reads the keys that are in it.
#pragma once

#include "launch_order.cuh"
#include "page_bounds.cuh"

namespace quest::cuda {

template <class T>
__global__ void __launch_bounds__(kBoundsThreads) update_bounds_kernel(const UpdateBoundsParams p) {
  wait_for_previous_kernel();
  const Paging& g = p.paging;
  const int page = blockIdx.x % g.P;
  const int head = blockIdx.x / g.P % p.size.Hkv;
  const int b = blockIdx.x / g.P / p.size.Hkv;
  const int first = page << g.page_shift;
  const int first_token = p.first_token ? p.first_token[b] : 0;
  const int tokens = min(g.page_size(), g.length(b) - first);
  if (tokens <= 0 || first + g.page_size() <= first_token) return;
  const int64_t physical = g.physical(b, page);
  if (physical < 0) return;

  PageBounds<T> bounds(p.size.D);
  if (bounds.active) {
    const T* keys = static_cast<const T*>(p.k_cache.data) + physical * p.k_cache.stride_n + head * p.k_cache.stride_h +
                    bounds.offset();
    for (int s = bounds.row; s < tokens; s += bounds.rows)
      bounds.add(load_vec(keys + s * p.k_cache.stride_s, p.k_cache.aligned));
  }
  bounds.store(p.k_bounds, physical, head);
  start_next_kernel();
}

}  // namespace quest::cuda
