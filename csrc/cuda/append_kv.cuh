// append_kv: a block owns one (sequence, head, page touched). It copies the page's new tokens into the cache and
// recomputes the page's bounds from the older keys, read from the cache, and the new ones.
#pragma once

#include <cutlass/fast_math.h>

#include "core/ptx.cuh"
#include "tile/page_bounds.cuh"
#include "tile/page_mean_std.cuh"

namespace quest::cuda {

// A block does little work, so the host prepares its divisions.
struct AppendKernelParams {
  AppendParams op;
  cutlass::FastDivmod touched, heads;
  explicit AppendKernelParams(const AppendParams& p) : op(p), touched(p.max_touched), heads(p.size.Hkv) {}
  int64_t blocks() const { return int64_t{touched.divisor} * heads.divisor * op.size.B; }
};

template <class T, bool kMeanStd>
using SummaryShared =
    typename std::conditional_t<kMeanStd, PageMeanStd<T, kBoundsThreads>, PageBounds<T, kBoundsThreads>>::Shared;

// One block writes the new tokens [start, end) of sequence b that fall into a page, and the page's bounds.
template <class T, bool kMeanStd>
__device__ __forceinline__ void append_to_page(
    const AppendParams& p, int b, int head, int page, int start, int end, SummaryShared<T, kMeanStd>& shared) {
  const Paging& g = p.paging;
  const int first = page << g.page_shift;
  const int64_t physical = g.physical(b, page);
  if (physical < 0) return;
  const int tokens = min(g.page_size(), end - first);
  PageBounds<T, kBoundsThreads> bounds(p.size.D);
  if (bounds.active) {
    const auto cached = [&](const Cache& c) {
      return static_cast<T*>(c.data) + physical * c.stride_n + head * c.stride_h + bounds.offset();
    };
    const auto fresh = [&](const NewTokens& n) {
      return static_cast<const T*>(n.data) + b * n.stride_b + head * n.stride_h + bounds.offset();
    };
    T* const k_cache = cached(p.k_cache);
    T* const v_cache = cached(p.v_cache);
#pragma unroll 4
    for (int s = bounds.row; s < tokens; s += bounds.rows) {
      const int64_t t = first + s - start;
      if (t < 0) {
        if constexpr (!kMeanStd) bounds.add(load_vec(k_cache + s * p.k_cache.stride_s, p.k_cache.aligned));
        continue;
      }
      const Vec<T> key = load_vec(fresh(p.k) + t * p.k.stride_t, p.k.aligned);
      const Vec<T> value = load_vec(fresh(p.v) + t * p.v.stride_t, p.v.aligned);
      store_vec(k_cache + s * p.k_cache.stride_s, key, p.k_cache.aligned);
      store_vec(v_cache + s * p.v_cache.stride_s, value, p.v_cache.aligned);
      if constexpr (!kMeanStd) bounds.add(key);
    }
  }
  if constexpr (kMeanStd) {
    // New keys are read from k, since other threads write them to the cache.
    const T* const cached =
        static_cast<const T*>(p.k_cache.data) + physical * p.k_cache.stride_n + head * p.k_cache.stride_h;
    const T* const fresh = static_cast<const T*>(p.k.data) + b * p.k.stride_b + head * p.k.stride_h;
    PageMeanStd<T, kBoundsThreads>::renew(p.k_bounds, physical, head, p.size.D, tokens, shared, [&](int s, int d) {
      const int64_t t = first + s - start;
      return t < 0 ? load_pair(cached + s * p.k_cache.stride_s + d, p.k_cache.aligned)
                   : load_pair(fresh + t * p.k.stride_t + d, p.k.aligned);
    });
  } else {
    bounds.store(p.k_bounds, physical, head, shared);
  }
}

// kPlain: neither new_lens nor end_lens is given, and bounds do not have 4 bits. A kernel that never asks is 0.08 us
// faster.
template <class T, bool kMeanStd, bool kPlain>
__global__ void __launch_bounds__(kBoundsThreads) append_kv_kernel(const AppendKernelParams params) {
  AppendParams p = params.op;
  if constexpr (kPlain) p.paging.new_lens = nullptr, p.end_lens = nullptr, p.k_bounds.packed = false;
  __shared__ SummaryShared<T, kMeanStd> shared;
  start_next_kernel();  // its blocks take their places now and wait for the writes below
  int touched, head, b, sequence_head;
  params.touched(sequence_head, touched, static_cast<int>(blockIdx.x));
  params.heads(b, head, sequence_head);
  wait_for_previous_kernel();
  const int start = p.paging.length(b);
  const int end = min(start + p.new_tokens(b), p.paging.capacity());
  const int page = (start >> p.paging.page_shift) + touched;
  if (page << p.paging.page_shift >= end || start == end) return;
  append_to_page<T, kMeanStd>(p, b, head, page, start, end, shared);
}

}  // namespace quest::cuda
