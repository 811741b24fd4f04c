// append_kv: a block owns one (sequence, head, page touched). It copies the page's new tokens into the cache and
// recomputes the page's bounds from the older keys, read from the cache, and the new ones, already in registers.
#pragma once

#include "core/ptx.cuh"
#include "tile/page_bounds.cuh"

namespace quest::cuda {

// One block writes the new tokens [start, end) of sequence b that fall into a page, and the page's bounds.
template <class T, int kThreads>
__device__ __forceinline__ void append_to_page(
    const AppendParams& p, int b, int head, int page, int start, int end,
    typename PageBounds<T, kThreads>::Shared& shared) {
  const Paging& g = p.paging;
  const int first = page << g.page_shift;
  const int64_t physical = g.physical(b, page);
  if (physical < 0) return;
  PageBounds<T, kThreads> bounds(p.size.D);
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
#pragma unroll 4
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
  bounds.store(p.k_bounds, physical, head, shared);
}

template <class T>
__global__ void __launch_bounds__(kBoundsThreads) append_kv_kernel(const AppendParams p) {
  __shared__ typename PageBounds<T, kBoundsThreads>::Shared shared;
  start_next_kernel();  // its blocks take their places now and wait for the writes below
  const int touched = blockIdx.x % p.max_touched;
  const int head = blockIdx.x / p.max_touched % p.size.Hkv;
  const int b = blockIdx.x / p.max_touched / p.size.Hkv;
  wait_for_previous_kernel();
  const int start = p.paging.length(b);
  const int end = min(start + p.new_tokens(b), p.paging.capacity());
  const int page = (start >> p.paging.page_shift) + touched;
  if (page << p.paging.page_shift >= end || start == end) return;
  append_to_page<T, kBoundsThreads>(p, b, head, page, start, end, shared);
}

}  // namespace quest::cuda
