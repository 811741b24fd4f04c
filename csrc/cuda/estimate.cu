#include <torch/csrc/stable/library.h>

#include "../namespace.h"
#include "estimate.cuh"
#include "host/launch.h"
#include "host/nvtx_range.h"
#include "host/value_checks.h"

namespace quest::cuda {

namespace {

template <class T, class Bound>
void launch_estimate(const EstimateParams& p, cudaStream_t stream) {
  const auto launch = [&](auto* kernel, int pages_per_tile) {
    const EstimateKernelParams arguments(p, pages_per_tile);
    launch_in_order(kernel, grid_size(arguments.blocks(), "estimate"), kEstimateThreads, 0, stream, arguments);
  };
  if constexpr (sizeof(T) == 2) {
    if (p.q.aligned && p.k_bounds.aligned)
      return dispatch_head_dim(p.size.D, [&]<int D>(std::integral_constant<int, D>) {
        launch(estimate_mma_kernel<T, Bound, D>, kMmaEstimatePages);
      });
  }
  launch(estimate_simt_kernel<T, Bound>, kEstimateThreads);
}

}  // namespace

Tensor estimate(
    Tensor q, Tensor k_bounds, Tensor page_table, Tensor seq_lens, int64_t page_size, std::optional<Tensor> k_scales,
    std::optional<Tensor> new_lens) {
  EstimateParams p = check_estimate(q, k_bounds, page_table, seq_lens, page_size, k_scales, new_lens);
  const NvtxRange range("estimate");
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const cudaStream_t stream = current_stream(q);
  check_values_if_requested(p, stream);
  std::vector<int64_t> shape(q.sizes().begin(), q.sizes().end());
  shape.back() = p.paging.P;
  Tensor scores = torch::stable::empty(shape, ScalarType::Float, std::nullopt, q.device());
  if (scores.numel() == 0) return scores;
  p.scores = static_cast<float*>(scores.mutable_data_ptr());
  dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    if (p.k_bounds.packed) return launch_estimate<T, Nibbles>(p, stream);
    p.k_bounds.scales ? launch_estimate<T, int8_t>(p, stream) : launch_estimate<T, T>(p, stream);
  });
  return scores;
}

QUEST_LIBRARY_IMPL(CUDA, m) { m.impl("estimate", TORCH_BOX(&estimate)); }

}  // namespace quest::cuda
