#include <torch/csrc/stable/library.h>

#include "../four_operators.h"
#include "../mark_written.h"
#include "../namespace.h"
#include "append_kv.cuh"
#include "host/launch.h"
#include "host/nvtx_range.h"
#include "host/value_checks.h"

namespace quest::cuda {

void append_until(
    Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor k_bounds, Tensor page_table, Tensor seq_lens,
    std::optional<Tensor> new_lens, std::optional<Tensor> k_scales, std::optional<double> std_factor,
    std::optional<Tensor> end_lens) {
  const AppendParams p = check_append_kv(
      k, v, k_cache, v_cache, k_bounds, page_table, seq_lens, new_lens, k_scales, std_factor, "seq_lens", end_lens);
  const NvtxRange range("append_kv");
  const torch::stable::accelerator::DeviceGuard guard(k.get_device_index());
  const cudaStream_t stream = current_stream(k);
  check_values_if_requested(p, stream);
  mark_written({{"k_cache", k_cache}, {"v_cache", v_cache}, {"k_bounds", k_bounds}}, k_scales);
  if (p.size.B == 0 || p.size.Hkv == 0 || p.max_touched == 0) return;
  const AppendKernelParams params(p);
  dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    const bool plain = !p.paging.new_lens && !p.end_lens && !p.k_bounds.packed;
    auto* const kernel = p.k_bounds.mean_std
                             ? (plain ? append_kv_kernel<T, true, true> : append_kv_kernel<T, true, false>)
                             : (plain ? append_kv_kernel<T, false, true> : append_kv_kernel<T, false, false>);
    launch_in_order(kernel, grid_size(params.blocks(), "append_kv"), kBoundsThreads, 0, stream, params);
  });
}

void append_kv(
    Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor k_bounds, Tensor page_table, Tensor seq_lens,
    std::optional<Tensor> new_lens, std::optional<Tensor> k_scales, std::optional<double> std_factor) {
  append_until(k, v, k_cache, v_cache, k_bounds, page_table, seq_lens, new_lens, k_scales, std_factor, std::nullopt);
}

QUEST_LIBRARY_IMPL(CUDA, m) { m.impl("append_kv", TORCH_BOX(&append_kv)); }

}  // namespace quest::cuda
