#include <torch/csrc/stable/library.h>

#include "../namespace.h"
#include "../operators.h"
#include "decode_step.cuh"
#include "launch.h"
#include "profiler_range.h"

namespace quest::cuda {

namespace {

// What one launch can do; the rest are four.
bool fits_one_launch(const StepParams& p) {
  const int group = p.size.group();
  const bool aligned = p.q.aligned && p.append.k.aligned && p.append.v.aligned && p.append.k_cache.aligned &&
                       p.append.v_cache.aligned && p.append.k_bounds.aligned;
  const bool one_list =
      p.reduce == GroupReduce::max || p.reduce == GroupReduce::sum || (p.reduce == GroupReduce::none && group == 1);
  // Where the page being written is not always read, its bounds matter to the scores, and must be there first.
  return aligned && one_list && p.size.T == 1 && p.append.dtype != DType::f32 && group <= kMmaHeads &&
         p.size.B <= kMostSequences && p.recent_pages > 0;
}

// The step's scratch memory: what is where follows from the sizes.
Tensor lay_out(StepParams& p, const Tensor& like) {
  const int64_t rows = int64_t{p.size.B} * p.size.Hkv, chunk_heads = rows * p.most_parts * p.size.group();
  p.keys_stride = key_room(p.paging.P) + key_room(groups_of(p.paging.P));
  int64_t bytes = 0;
  const auto reserve = [&](int64_t count, int64_t size) {
    const int64_t at = bytes;
    bytes += (count * size + 127) / 128 * 128;
    return at;
  };
  const int64_t progress = reserve(rows + 1, sizeof(RowProgress));
  const int64_t outs = reserve(chunk_heads * p.size.D, sizeof(float)), sums = reserve(chunk_heads, sizeof(float2));
  const int64_t keys = reserve(rows * p.keys_stride, sizeof(uint32_t));
  Tensor scratch = torch::stable::empty({bytes}, ScalarType::Byte, std::nullopt, like.device());
  std::byte* const at = static_cast<std::byte*>(scratch.mutable_data_ptr());
  p.progress = reinterpret_cast<StepProgress*>(at + progress);
  p.outs = reinterpret_cast<float*>(at + outs);
  p.sums = reinterpret_cast<float2*>(at + sums);
  p.keys = reinterpret_cast<uint32_t*>(at + keys);
  return scratch;
}

// False where the four operators have to do it.
template <class T, class Bound, int D>
bool launch_step(StepParams& p, const Tensor& q, cudaStream_t stream) {
  using Block = StepBlock<T, Bound, D>;
  const int device = q.get_device_index();
  constexpr int kShared = Block::kSharedBytes;
  if (!has_shared(device, kShared)) return false;
  const int64_t rows = int64_t{p.size.B} * p.size.Hkv;
  const int processors = device_attribute(cudaDevAttrMultiProcessorCount, device);
  const int64_t resident =
      int64_t{processors} * blocks_a_processor(decode_step_kernel<T, Bound, D>, kStepThreads, kShared);
  const int64_t list_tokens = int64_t{std::min(p.K, p.paging.P)} << p.paging.page_shift;
  const int64_t chunks = std::max<int64_t>(1, (list_tokens + kChunkTokens - 1) / kChunkTokens);
  const ChunkSplit split(rows, chunks, resident);
  p.part_chunks = split.part_chunks, p.most_parts = split.parts;
  while (2 << p.score_shift <= kStepWarps && p.size.Hkv % (2 << p.score_shift) == 0) ++p.score_shift;
  const int64_t tiles = p.paging.P > p.K ? (p.paging.P + kMmaRows - 1) / kMmaRows : 1;
  // And some that have nothing else to do, for the bounds of the newest pages.
  const int64_t others = (rows + kStepWarps - 1) / kStepWarps;
  const int64_t blocks =
      std::min(resident, std::max((rows * tiles + kStepWarps - 1) / kStepWarps, rows * chunks) + others);
  const Tensor scratch = lay_out(p, q);
  launch_in_order(
      clear_progress_kernel, 1u, kStepThreads, 0, stream,
      ClearParams{
          reinterpret_cast<int*>(p.progress), (rows + 1) * static_cast<int64_t>(sizeof(RowProgress) / sizeof(int))});
  launch_in_order(decode_step_kernel<T, Bound, D>, static_cast<unsigned>(blocks), kStepThreads, kShared, stream, p);
  return true;
}

template <class T, class Bound>
bool launch_step(StepParams& p, const Tensor& q, cudaStream_t stream) {
  bool launched = false;
  if constexpr (sizeof(T) == 2)
    dispatch_head_dim(
        p.size.D, [&]<int D>(std::integral_constant<int, D>) { launched = launch_step<T, Bound, D>(p, q, stream); });
  return launched;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> decode_step(
    Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor k_bounds, Tensor page_table, Tensor start_lens,
    Tensor seq_lens, int64_t num_pages, int64_t group_reduce, int64_t sink_pages, int64_t recent_pages,
    std::optional<double> scale, std::optional<Tensor> k_scales) {
  const DecodeStepParams c = check_decode_step(
      q, k, v, k_cache, v_cache, k_bounds, page_table, start_lens, seq_lens, num_pages, group_reduce, sink_pages,
      recent_pages, scale, k_scales);
  StepParams p{};
  p.append = c.append, p.size = c.size, p.paging = c.paging, p.q = c.q;
  p.K = c.K, p.sink_pages = c.sink_pages, p.recent_pages = c.recent_pages, p.reduce = c.reduce, p.scale = c.scale;
  const torch::stable::accelerator::DeviceGuard guard(q.get_device_index());
  const cudaStream_t stream = current_stream(q);
  check_values_if_requested(c, stream);
  if (fits_one_launch(p)) {
    const ProfilerRange range("decode_step");
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
      launched = p.append.k_bounds.scales ? launch_step<T, int8_t>(p, q, stream) : launch_step<T, T>(p, q, stream);
    });
    if (launched) return {out, lse, pages};
  }
  return four_operators(
      q, k, v, k_cache, v_cache, k_bounds, page_table, start_lens, seq_lens, num_pages, group_reduce, sink_pages,
      recent_pages, p.scale, k_scales);
}

QUEST_LIBRARY_IMPL(CUDA, m) { m.impl("decode_step", TORCH_BOX(&decode_step)); }

}  // namespace quest::cuda
