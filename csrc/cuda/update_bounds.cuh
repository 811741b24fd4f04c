// update_bounds: a block owns one (sequence, head, page) and reads the page's keys.
#pragma once

#include "core/ptx.cuh"
#include "tile/page_bounds.cuh"
#include "tile/page_mean_std.cuh"

namespace quest::cuda {

template <class T, bool kMeanStd>
__global__ void __launch_bounds__(kBoundsThreads) update_bounds_kernel(const UpdateBoundsParams p) {
  using Summary = std::conditional_t<kMeanStd, PageMeanStd<T, kBoundsThreads>, PageBounds<T, kBoundsThreads>>;
  __shared__ typename Summary::Shared shared;
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

  if constexpr (kMeanStd)
    renew_page_mean_std<T, kBoundsThreads>(p.k_cache, p.k_bounds, p.size.D, physical, head, tokens, nullptr, shared);
  else
    renew_page_bounds<T, kBoundsThreads>(p.k_cache, p.k_bounds, p.size.D, physical, head, tokens, nullptr, shared);
  start_next_kernel();
}

}  // namespace quest::cuda
