#include <torch/csrc/stable/library.h>

#include "../namespace.h"
#include "decode_step.cuh"
#include "launch.h"
#include "ops.h"
#include "profiler_range.h"

namespace quest::cuda {

namespace {

constexpr unsigned kMostBlocks = 16;  // of a cluster, the most that Hopper has
// Of a block, besides what it has statically: two of them share an SM, but for wide heads.
int most_memory(int D, int device) {
  return std::min(
      (D <= 128 ? 100 : 200) * 1024, device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device) - 24 * 1024);
}

int round_up(int x, int unit) { return (x + unit - 1) / unit * unit; }

// What one launch can do; the rest are four.
bool fits_one_launch(const StepParams& p, int device) {
  const int group = p.size.group();
  const bool aligned = p.q.aligned && p.append.k.aligned && p.append.v.aligned && p.append.k_cache.aligned &&
                       p.append.v_cache.aligned && p.append.k_bounds.aligned;
  const bool one_list =
      p.reduce == GroupReduce::max || p.reduce == GroupReduce::sum || (p.reduce == GroupReduce::none && group == 1);
  return aligned && one_list && p.size.T == 1 && p.append.dtype != DType::f32 && group <= kMmaHeads &&
         device_attribute(cudaDevAttrComputeCapabilityMajor, device) >= 9;
}

// The chunks of a block and its memory for clusters of so many blocks; false where there is too little of it.
bool lay_out(StepParams& p, int cluster, int most) {
  const int group = p.size.group(), D = p.size.D;
  const int64_t tokens = int64_t{p.K} << p.paging.page_shift;
  const int chunks = static_cast<int>((tokens + kChunkTokens - 1) / kChunkTokens);
  int part_chunks = 1;
  while (part_chunks < kSpanChunks && part_chunks * cluster < chunks) part_chunks *= 2;
  if (part_chunks * cluster < chunks) part_chunks = round_up((chunks + cluster - 1) / cluster, kSpanChunks);
  for (;; part_chunks = part_chunks < kSpanChunks ? part_chunks * 2 : part_chunks + kSpanChunks) {
    const int in_span = part_chunks < kSpanChunks ? kSpanChunks : 1;
    const int parts = in_span == 1 ? part_chunks * cluster / kSpanChunks : part_chunks * cluster;
    const int spans = (parts + in_span - 1) / in_span;
    const int64_t weights = (int64_t{spans} * (in_span + 2) + 1) * group * sizeof(FoldWeights);
    const int64_t warp_out = std::max<int64_t>(sizeof(float) * kStepWarps * group * D, (weights + 15) / 16 * 16);
    const int64_t all_parts = int64_t{parts} * group * (D + 2) * sizeof(float);
    const int64_t keys = int64_t{sizeof(uint32_t)} * p.paging.P;
    const int64_t table = int64_t{sizeof(int)} * p.paging.P;
    StepMemory& m = p.memory;
    m.list = 0;
    m.chosen = (part_chunks * kChunkTokens >> p.paging.page_shift) * static_cast<int>(sizeof(ListedPage));
    m.keys = m.warp_out = round_up(m.chosen + p.K * static_cast<int>(sizeof(int)), 16);
    m.parts = m.warp_out + static_cast<int>(warp_out);
    const int64_t least = m.keys + std::max(keys, warp_out + all_parts);
    // The spans' order is that of the combine kernel as long as each is a slice of its own.
    if (least <= most && spans <= kCombineThreads / (D / 4) && group * spans <= kStepThreads) {
      const bool with_table = m.keys + keys + table <= most;
      m.table = with_table ? m.keys + static_cast<int>(keys) : -1;
      m.bytes = static_cast<int>(with_table ? std::max(least, m.keys + keys + table) : least);
      p.part_chunks = part_chunks;
      return true;
    }
    if (part_chunks >= chunks) return false;
  }
}

// More pages a block than this, and four launches that fill the machine with blocks were measured to be faster.
constexpr int kMostPages = 1024;

// The most blocks a cluster with which all of them are there at once; 1 where none will do. 0: too little memory, or
// too many pages.
template <class T, class Bound, int D>
unsigned plan(StepParams& p, int device) {
  const int most = most_memory(D, device);
  const int64_t rows = int64_t{p.size.B} * p.size.Hkv;
  for (unsigned cluster = kMostBlocks; cluster > 1; cluster /= 2)
    if (lay_out(p, cluster, most) &&
        active_clusters(decode_step_kernel<T, Bound, D>, kStepThreads, p.memory.bytes, cluster) >= rows)
      return p.paging.P <= int64_t{kMostPages} * cluster ? cluster : 0;
  return lay_out(p, 1, most) ? 1 : 0;
}

// False where the four operators have to do it.
template <class T, class Bound>
bool launch_step(StepParams& p, int device, cudaStream_t stream) {
  unsigned cluster = 0;
  if constexpr (sizeof(T) == 2)
    dispatch_head_dim(p.size.D, [&]<int D>(std::integral_constant<int, D>) {
      cluster = plan<T, Bound, D>(p, device);
      if (cluster == 0) return;
      const unsigned blocks = grid_size(int64_t{p.size.B} * p.size.Hkv * cluster, "decode_step");
      launch_in_order(decode_step_kernel<T, Bound, D>, blocks, kStepThreads, p.memory.bytes, stream, p, cluster);
    });
  return cluster != 0;
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
  const int device = q.get_device_index();
  const cudaStream_t stream = current_stream(q);
  check_values_if_requested(c, stream);
  if (fits_one_launch(p, device)) {
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
      launched =
          p.append.k_bounds.scales ? launch_step<T, int8_t>(p, device, stream) : launch_step<T, T>(p, device, stream);
    });
    if (launched) return {out, lse, pages};
  }
  append_kv(k, v, k_cache, v_cache, k_bounds, page_table, start_lens, std::nullopt, k_scales);
  const int64_t page_size = k_cache.size(2);
  const Tensor scores = estimate(q, k_bounds, page_table, seq_lens, page_size, k_scales);
  Tensor pages = topk_pages(
      scores, seq_lens, page_size, num_pages, k_cache.size(1), group_reduce, sink_pages, recent_pages, p.scale);
  auto [out, lse] = sparse_decode(q, k_cache, v_cache, page_table, seq_lens, pages, p.scale);
  return {out, lse, pages};
}

QUEST_LIBRARY_IMPL(CUDA, m) { m.impl("decode_step", TORCH_BOX(&decode_step)); }

}  // namespace quest::cuda
