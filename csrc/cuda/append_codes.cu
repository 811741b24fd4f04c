#include <torch/csrc/stable/library.h>

#include "../mark_written.h"
#include "../namespace.h"
#include "append_codes.cuh"
#include "host/launch.h"
#include "host/nvtx_range.h"
#include "host/value_checks.h"

namespace quest::cuda {

void append_codes(
    Tensor k, Tensor k_codes, Tensor code_scales, Tensor page_table, Tensor seq_lens, std::optional<Tensor> new_lens) {
  const AppendCodesParams p = check_append_codes(k, k_codes, code_scales, page_table, seq_lens, new_lens);
  const NvtxRange range("append_codes");
  const torch::stable::accelerator::DeviceGuard guard(k.get_device_index());
  const cudaStream_t stream = current_stream(k);
  check_values_if_requested(p, stream);
  mark_written({{"k_codes", k_codes}, {"code_scales", code_scales}});
  const int64_t keys = int64_t{p.size.B} * p.size.T * p.size.Hkv;
  if (keys == 0) return;
  const unsigned blocks = grid_size((keys + kCodesWarps - 1) / kCodesWarps, "append_codes");
  dispatch_dtype(p.dtype, [&](auto element) {
    using T = decltype(element);
    dispatch_head_dim(p.size.D, [&]<int D>(std::integral_constant<int, D>) {
      launch_in_order(append_codes_kernel<T, D>, blocks, kCodesThreads, 0, stream, p);
    });
  });
}

QUEST_LIBRARY_IMPL(CUDA, m) { m.impl("append_codes", TORCH_BOX(&append_codes)); }

}  // namespace quest::cuda
