// append_kv: a block owns one (sequence, head, page touched): it copies the new tokens of that page into the cache and
// recomputes the page's bounds from the keys before them, read from the cache, and the new ones, already in registers.
#pragma once

#include "launch_order.cuh"
#include "page_bounds.cuh"

namespace quest::cuda {

template <class T>
__global__ void __launch_bounds__(kBoundsThreads) append_kv_kernel(const AppendParams p) {
  wait_for_previous_kernel();
  const int touched = blockIdx.x % p.max_touched;
  const int head = blockIdx.x / p.max_touched % p.size.Hkv;
  const int b = blockIdx.x / p.max_touched / p.size.Hkv;
  const Paging& g = p.paging;
  const int start = g.length(b);
  const int end = min(start + p.new_tokens(b), g.capacity());
  const int page = (start >> g.page_shift) + touched;
  const int first = page << g.page_shift;
  if (first >= end || start == end) return;
  const int64_t physical = g.physical(b, page);
  if (physical < 0) return;

  PageBounds<T> bounds(p.size.D);
  if (bounds.active) {
    const auto cached = [&](const Cache& c) {
      return static_cast<T*>(c.data) + physical * c.stride_n + head * c.stride_h + bounds.offset();
    };
    const auto fresh = [&](const NewTokens& n) {
      return static_cast<const T*>(n.data) + b * n.stride_b + head * n.stride_h + bounds.offset();
    };
    T* const k_cache = cached(p.k_cache);
    T* const v_cache = cached(p.v_cache);
    const int tokens = min(g.page_size(), end - first);
    for (int s = bounds.row; s < tokens; s += bounds.rows) {
      const int64_t t = first + s - start;
      if (t < 0) {
        bounds.add(load_vec(k_cache + s * p.k_cache.stride_s, p.k_cache.aligned));
        continue;
      }
      const Vec<T> key = load_vec(fresh(p.k) + t * p.k.stride_t, p.k.aligned);
      const Vec<T> value = load_vec(fresh(p.v) + t * p.v.stride_t, p.v.aligned);
      store_vec(k_cache + s * p.k_cache.stride_s, key, p.k_cache.aligned);
      store_vec(v_cache + s * p.v_cache.stride_s, value, p.v_cache.aligned);
      bounds.add(key);
    }
  }
  bounds.store(p.k_bounds, physical, head);
  start_next_kernel();
}

}  // namespace quest::cuda
