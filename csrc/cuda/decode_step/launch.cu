#include <torch/csrc/stable/library.h>

#include "../../four_operators.h"
#include "../../kept_pages.h"
#include "../../mark_written.h"
#include "../../namespace.h"
#include "../host/nvtx_range.h"
#include "../host/value_checks.h"
#include "launch.h"

namespace quest::cuda {

namespace {

// The steps that one launch can do; the four operators do the others.
bool fits_one_launch(const DecodeStepParams& p) {
  const int group = p.size.group();
  const bool aligned = p.q.aligned && p.append.k.aligned && p.append.v.aligned && p.append.k_cache.aligned &&
                       p.append.v_cache.aligned && p.append.k_bounds.aligned;
  const bool one_list =
      p.reduce == GroupReduce::max || p.reduce == GroupReduce::sum || (p.reduce == GroupReduce::none && group == 1);
  // Where the page being written is not always read, its new bounds matter to the scores and must be there first.
  const bool reads = p.dense || (one_list && p.recent_pages > 0);
  return aligned && reads && p.size.T == 1 && p.append.dtype != DType::f32 && group <= kMaxHeadTiles * kMmaHeads &&
         p.size.B <= kMaxSequences;
}

template <class T>
bool launch_with_bounds(const DecodeStepParams& p, const Tensor& q, cudaStream_t stream) {
  const Bounds& bounds = p.append.k_bounds;
  if (bounds.packed) return launch_step<T, Nibbles>(p, q, stream);
  return bounds.scales ? launch_step<T, int8_t>(p, q, stream) : launch_step<T, T>(p, q, stream);
}

// A thread for each entry of a list.
struct KeepParams {
  DecodeStepParams op;
  int32_t* lists;  // [B, Hs, K] contiguous
};
constexpr int kKeepThreads = 256;
__global__ void __launch_bounds__(kKeepThreads) keep_pages_kernel(const KeepParams params) {
  const DecodeStepParams& p = params.op;
  start_next_kernel();
  wait_for_previous_kernel();
  const int64_t entry = int64_t{blockIdx.x} * kKeepThreads + threadIdx.x, list = entry / p.K;
  if (list >= int64_t{p.size.B} * p.Hs) return;
  const int b = static_cast<int>(list / p.Hs), h = static_cast<int>(list % p.Hs);
  keep_page(p, b, h, static_cast<int>(entry % p.K), params.lists + list * p.K);
}

void launch_keep_pages(const DecodeStepParams& p, int32_t* lists, cudaStream_t stream) {
  const int64_t entries = int64_t{p.size.B} * p.Hs * p.K, blocks = (entries + kKeepThreads - 1) / kKeepThreads;
  launch_in_order(
      keep_pages_kernel, grid_size(blocks, "decode_step"), kKeepThreads, 0, stream,
      KeepParams{.op = p, .lists = lists});
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> decode_step(
    Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor k_bounds, Tensor page_table, Tensor start_lens,
    Tensor seq_lens, int64_t num_pages, int64_t group_reduce, int64_t sink_pages, int64_t recent_pages,
    std::optional<double> scale, std::optional<Tensor> k_scales, std::optional<Tensor> new_lens,
    std::optional<Tensor> budgets, std::optional<double> std_factor, std::optional<Tensor> counters,
    std::optional<Tensor> kept_pages, std::optional<Tensor> kept_steps, int64_t reselect_every, int64_t dense_below) {
  DecodeStepParams p = check_decode_step(
      q, k, v, k_cache, v_cache, k_bounds, page_table, start_lens, seq_lens, num_pages, group_reduce, sink_pages,
      recent_pages, scale, k_scales, new_lens, budgets, std_factor, counters, kept_pages, kept_steps, reselect_every,
      dense_below);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const cudaStream_t stream = current_stream(q);
  check_values_if_requested(p, stream);
  if (counters) mark_written({{"counters", *counters}});
  if (kept_pages) mark_written({{"kept_pages", *kept_pages}});
  const auto empty = [&](std::vector<int64_t> shape, ScalarType dtype) {
    return torch::stable::empty(shape, dtype, std::nullopt, q.device());
  };
  const std::vector<int64_t> shape(q.sizes().begin(), q.sizes().end());
  const auto empty_lists = [&] {
    std::vector<int64_t> lists = shape;
    lists[lists.size() - 2] = p.Hs, lists.back() = p.dense || kept_pages ? 0 : p.K;
    return empty(lists, ScalarType::Int);
  };
  if (fits_one_launch(p)) {
    mark_written({{"k_cache", k_cache}, {"v_cache", v_cache}, {"k_bounds", k_bounds}}, k_scales);
    const NvtxRange range("decode_step");
    Tensor out = empty(shape, q.scalar_type());
    Tensor lse = empty({shape.begin(), shape.end() - 1}, ScalarType::Float);
    Tensor pages = empty_lists();
    if (lse.numel() == 0) return {out, lse, pages};
    p.out = out.mutable_data_ptr();
    p.lse = static_cast<float*>(lse.mutable_data_ptr());
    if (!p.dense) {
      p.pages = kept_pages ? p.kept.pages : static_cast<int32_t*>(pages.mutable_data_ptr());
      p.pages_stride = kept_pages ? p.kept.stride : p.K;
    }
    if (p.append.dtype == DType::f16 ? launch_with_bounds<__half>(p, q, stream)
                                     : launch_with_bounds<__nv_bfloat16>(p, q, stream))
      return {out, lse, pages};
  }
  if (p.dense) {
    append_until(k, v, k_cache, v_cache, k_bounds, page_table, start_lens, new_lens, k_scales, std_factor, seq_lens);
    auto [out, lse] = sparse_decode(q, k_cache, v_cache, page_table, seq_lens, std::nullopt, p.scale, new_lens);
    return {out, lse, empty_lists()};
  }
  return four_operators(
      q, k, v, k_cache, v_cache, k_bounds, page_table, start_lens, seq_lens, num_pages, group_reduce, sink_pages,
      recent_pages, p.scale, k_scales, new_lens, budgets, std_factor, dense_below, [&](const Tensor& pages) {
        if (!kept_pages) return pages;
        if (pages.numel() > 0) launch_keep_pages(p, static_cast<int32_t*>(pages.mutable_data_ptr()), stream);
        return empty_lists();
      });
}

QUEST_LIBRARY_IMPL(CUDA, m) { m.impl("decode_step", TORCH_BOX(&decode_step)); }

}  // namespace quest::cuda
