#include <torch/csrc/stable/library.h>

#include "../mark_written.h"
#include "../namespace.h"
#include "host/launch.h"
#include "host/nvtx_range.h"
#include "host/value_checks.h"
#include "update_bounds.cuh"

namespace quest::cuda {

void update_bounds(
    Tensor k_cache, Tensor k_bounds, Tensor page_table, Tensor seq_lens, std::optional<Tensor> first_token,
    std::optional<Tensor> k_scales, std::optional<double> std_factor) {
  const UpdateBoundsParams p =
      check_update_bounds(k_cache, k_bounds, page_table, seq_lens, first_token, k_scales, std_factor);
  const NvtxRange range("update_bounds");
  const torch::stable::accelerator::DeviceGuard guard(k_cache.get_device_index());
  const cudaStream_t stream = current_stream(k_cache);
  check_values_if_requested(p, stream);
  mark_written({{"k_bounds", k_bounds}}, k_scales);
  const int64_t blocks = int64_t{p.size.B} * p.size.Hkv * p.paging.P;
  if (blocks == 0) return;
  dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    auto* const kernel = p.k_bounds.mean_std ? update_bounds_kernel<T, true> : update_bounds_kernel<T, false>;
    launch_in_order(kernel, grid_size(blocks, "update_bounds"), kBoundsThreads, 0, stream, p);
  });
}

QUEST_LIBRARY_IMPL(CUDA, m) { m.impl("update_bounds", TORCH_BOX(&update_bounds)); }

}  // namespace quest::cuda
