#include <torch/csrc/stable/library.h>

#include "../../four_operators.h"
#include "../../mark_written.h"
#include "../../namespace.h"
#include "../host/nvtx_range.h"
#include "../host/split.h"
#include "../host/value_checks.h"
#include "kernel.cuh"

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
  return aligned && one_list && p.size.T == 1 && p.append.dtype != DType::f32 && group <= kMmaHeads &&
         p.size.B <= kMaxSequences && p.recent_pages > 0;
}

// Allocates the step's scratch memory in one piece, sets the pointers into it, and clears the counters.
Tensor allocate_scratch(DecodeStepKernelParams& params, const Tensor& like, cudaStream_t stream) {
  const DecodeStepParams& p = params.op;
  const int64_t rows = int64_t{p.size.B} * p.size.Hkv, partials = rows * p.size.group() * params.partials.count;
  params.keys_stride = key_room(p.paging.P) + key_room(superpages_of(p.paging.P));
  int64_t bytes = 0;
  const auto reserve = [&](int64_t count, int64_t size) {
    const int64_t at = bytes;
    bytes += (count * size + 127) / 128 * 128;
    return at;
  };
  const int64_t taken = reserve(1, sizeof(TakenSplits)), counters = reserve(rows, sizeof(RowCounters));
  const int64_t counter_bytes = bytes - taken;
  const int64_t out = reserve(partials * p.size.D, sizeof(float)), max_sum = reserve(partials, sizeof(float2));
  const int64_t keys = reserve(rows * params.keys_stride, sizeof(uint32_t));
  Tensor scratch = torch::stable::empty({bytes}, ScalarType::Byte, std::nullopt, like.device());
  std::byte* const start = static_cast<std::byte*>(scratch.mutable_data_ptr());
  params.taken = reinterpret_cast<TakenSplits*>(start + taken);
  params.rows = reinterpret_cast<RowCounters*>(start + counters);
  params.partials.out = reinterpret_cast<float*>(start + out);
  params.partials.max_sum = reinterpret_cast<float2*>(start + max_sum);
  params.keys = reinterpret_cast<uint32_t*>(start + keys);
  launch_in_order(
      clear_counters_kernel, 1u, kStepThreads, 0, stream,
      ClearParams{
          .counters = reinterpret_cast<int*>(start + taken),
          .count = counter_bytes / static_cast<int64_t>(sizeof(int))});
  return scratch;
}

// False where the device's shared memory is too small.
template <class T, class Bound, int D>
bool launch_step(const DecodeStepParams& p, const Tensor& q, cudaStream_t stream) {
  const int device = q.get_device_index();
  constexpr int kShared = sizeof(typename DecodeStep<T, Bound, D>::Memory);
  if (!has_shared(device, kShared)) return false;
  const int64_t rows = int64_t{p.size.B} * p.size.Hkv;
  const int processors = device_attribute(cudaDevAttrMultiProcessorCount, device);
  const int64_t resident =
      int64_t{processors} * blocks_per_processor(decode_step_kernel<T, Bound, D>, kStepThreads, kShared);
  const int64_t list_tokens = int64_t{std::min(p.K, p.paging.P)} << p.paging.page_shift;
  const int64_t tiles = std::max<int64_t>(1, (list_tokens + kTileTokens - 1) / kTileTokens);
  const SplitPlan plan(rows, tiles, resident);
  DecodeStepKernelParams params{.op = p, .partials = {.count = plan.partials, .tiles = plan.partial_tiles}};
  while (2 << params.score_heads_log2 <= kStepWarps && p.size.Hkv % (2 << params.score_heads_log2) == 0)
    ++params.score_heads_log2;
  const int64_t score_tiles = p.paging.P > p.K ? (p.paging.P + kMmaRows - 1) / kMmaRows : 1;
  // Some blocks have no split, and so renew the bounds of the newest pages meanwhile.
  const int64_t renewing = (rows + kStepWarps - 1) / kStepWarps;
  const int64_t blocks =
      std::min(resident, std::max((rows * score_tiles + kStepWarps - 1) / kStepWarps, rows * tiles) + renewing);
  const Tensor scratch = allocate_scratch(params, q, stream);
  launch_in_order(
      decode_step_kernel<T, Bound, D>, static_cast<unsigned>(blocks), kStepThreads, kShared, stream, params);
  return true;
}

template <class T, class Bound>
bool launch_step(const DecodeStepParams& p, const Tensor& q, cudaStream_t stream) {
  bool launched = false;
  if constexpr (sizeof(T) == 2)
    dispatch_head_dim(p.size.D, [&]<int D>(std::integral_constant<int, D>) {
      // Rows are copied in pieces of 16 bytes.
      if constexpr (kBoundsRowBytes<Bound, D> % 16 == 0) launched = launch_step<T, Bound, D>(p, q, stream);
    });
  return launched;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> decode_step(
    Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor k_bounds, Tensor page_table, Tensor start_lens,
    Tensor seq_lens, int64_t num_pages, int64_t group_reduce, int64_t sink_pages, int64_t recent_pages,
    std::optional<double> scale, std::optional<Tensor> k_scales, std::optional<Tensor> new_lens,
    std::optional<Tensor> budgets, std::optional<double> std_factor) {
  DecodeStepParams p = check_decode_step(
      q, k, v, k_cache, v_cache, k_bounds, page_table, start_lens, seq_lens, num_pages, group_reduce, sink_pages,
      recent_pages, scale, k_scales, new_lens, budgets, std_factor);
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const cudaStream_t stream = current_stream(q);
  check_values_if_requested(p, stream);
  if (fits_one_launch(p)) {
    mark_written({{"k_cache", k_cache}, {"v_cache", v_cache}, {"k_bounds", k_bounds}}, k_scales);
    const NvtxRange range("decode_step");
    const auto empty = [&](std::vector<int64_t> shape, ScalarType dtype) {
      return torch::stable::empty(shape, dtype, std::nullopt, q.device());
    };
    std::vector<int64_t> shape(q.sizes().begin(), q.sizes().end());
    Tensor out = empty(shape, q.scalar_type());
    Tensor lse = empty({shape.begin(), shape.end() - 1}, ScalarType::Float);
    shape[shape.size() - 2] = p.size.Hkv, shape.back() = p.K;
    Tensor pages = empty(shape, ScalarType::Int);
    if (lse.numel() == 0) return {out, lse, pages};
    p.out = out.mutable_data_ptr();
    p.lse = static_cast<float*>(lse.mutable_data_ptr());
    p.pages = static_cast<int32_t*>(pages.mutable_data_ptr());
    bool launched = false;
    dispatch_dtype(p.append.dtype, [&](auto element) {
      using T = decltype(element);
      launched = p.append.k_bounds.packed   ? launch_step<T, Nibbles>(p, q, stream)
                 : p.append.k_bounds.scales ? launch_step<T, int8_t>(p, q, stream)
                                            : launch_step<T, T>(p, q, stream);
    });
    if (launched) return {out, lse, pages};
  }
  return four_operators(
      q, k, v, k_cache, v_cache, k_bounds, page_table, start_lens, seq_lens, num_pages, group_reduce, sink_pages,
      recent_pages, p.scale, k_scales, new_lens, budgets, std_factor);
}

QUEST_LIBRARY_IMPL(CUDA, m) { m.impl("decode_step", TORCH_BOX(&decode_step)); }

}  // namespace quest::cuda
