// The launch of a step's kernel: its scratch memory and its grid.
#pragma once

#include "../host/launch.h"
#include "../host/split.h"
#include "kernel.cuh"
#include "launch.h"

namespace quest::cuda {

constexpr int kMaxDensePartials = 512;  // of the query heads of a KV head, at the cache's capacity

struct ClearParams {
  int* counters;
  int64_t count;
};
static __global__ void __launch_bounds__(kStepThreads) clear_counters_kernel(const ClearParams p) {
  start_next_kernel();  // its blocks take their places now and wait for the writes below
  wait_for_previous_kernel();
  for (int64_t i = threadIdx.x; i < p.count; i += kStepThreads) p.counters[i] = 0;
}

// Allocates the step's scratch memory in one piece and sets the pointers into it. Counters in it are cleared.
template <int kHeadTiles>
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
  constexpr int kInts = sizeof(RowCounters) / sizeof(int32_t);
  static_assert(kSharedCounters * sizeof(int32_t) >= sizeof(TakenSplits) && kHeadCounters == kMaxHeadTiles * kInts);
  // The kernel takes splits by a 64-bit addition.
  const bool given = p.counters && reinterpret_cast<uintptr_t>(p.counters) % alignof(TakenSplits) == 0;
  const int64_t cleared = given ? 0 : kSharedCounters + rows * kHeadTiles * kInts;
  const int64_t counters = reserve(cleared, sizeof(int32_t));
  const int64_t out = reserve(partials * p.size.D, sizeof(float)), max_sum = reserve(partials, sizeof(float2));
  const int64_t keys = reserve(rows * params.keys_stride, sizeof(uint32_t));
  Tensor scratch = torch::stable::empty({bytes}, ScalarType::Byte, std::nullopt, like.device());
  std::byte* const start = static_cast<std::byte*>(scratch.mutable_data_ptr());
  int32_t* const used = given ? p.counters : reinterpret_cast<int32_t*>(start + counters);
  params.taken = reinterpret_cast<TakenSplits*>(used);
  params.rows = reinterpret_cast<RowCounters*>(used + kSharedCounters);
  params.max_rows = static_cast<int32_t>(given ? (p.num_counters - kSharedCounters) / kHeadCounters : rows);
  params.partials.out = reinterpret_cast<float*>(start + out);
  params.partials.max_sum = reinterpret_cast<float2*>(start + max_sum);
  params.keys = reinterpret_cast<uint32_t*>(start + keys);
  if (!given)
    launch_in_order(
        clear_counters_kernel, 1u, kStepThreads, 0, stream, ClearParams{.counters = used, .count = cleared});
  return scratch;
}

template <class T, class Bound, int D, int kHeadTiles>
bool launch_kernel(const DecodeStepParams& p, const Tensor& q, cudaStream_t stream) {
  const int device = q.get_device_index();
  constexpr int kShared = sizeof(typename DecodeStep<T, Bound, D, kHeadTiles>::Memory);
  if (!has_shared(device, kShared)) return false;
  const int64_t rows = int64_t{p.size.B} * p.size.Hkv, attend_rows = rows * kHeadTiles;
  const int processors = device_attribute(cudaDevAttrMultiProcessorCount, device);
  const int64_t resident =
      int64_t{processors} * blocks_per_processor(decode_step_kernel<T, Bound, D, kHeadTiles>, kStepThreads, kShared);
  const int64_t list_tokens = int64_t{std::min(p.K, p.paging.P)} << p.paging.page_shift;
  const int64_t tiles = std::max<int64_t>(1, (list_tokens + kTileTokens - 1) / kTileTokens);
  const SplitPlan plan(attend_rows, tiles, resident);
  // One block combines a row. The kernels of sparse_decode combine many partials sooner, and dense rows select nothing.
  if (p.dense && plan.partials * p.size.group() > kMaxDensePartials) return false;
  DecodeStepKernelParams params{.op = p, .partials = {.count = plan.partials, .tiles = plan.partial_tiles}};
  // Lists that are shorter than the cache may have partials of a tile: room for them, where there are not too many.
  if (plan.partial_tiles > 1)
    params.partials.count =
        std::max(plan.partials, static_cast<int32_t>(std::min(tiles, kSupertile * resident / attend_rows + 1)));
  while (2 << params.score_heads_log2 <= kStepWarps && p.size.Hkv % (2 << params.score_heads_log2) == 0)
    ++params.score_heads_log2;
  const int64_t score_tiles = p.paging.P > p.num_pages ? (p.paging.P + kMmaRows - 1) / kMmaRows : 0;
  // Some blocks have no split, and so renew the bounds of the newest pages meanwhile.
  const int64_t renewing = (rows + kStepWarps - 1) / kStepWarps;
  const int64_t blocks =
      std::min(resident, std::max((rows * score_tiles + kStepWarps - 1) / kStepWarps, attend_rows * tiles) + renewing);
  params.large_tiles = static_cast<int32_t>(SplitPlan::large_tiles(resident));
  // Rows of one length get equally many splits. With more splits than blocks, the last ones would run alone.
  params.attend_splits = static_cast<int32_t>(attend_rows <= blocks ? blocks / attend_rows * attend_rows : blocks);
  const Tensor scratch = allocate_scratch<kHeadTiles>(params, q, stream);
  launch_in_order(
      decode_step_kernel<T, Bound, D, kHeadTiles>, static_cast<unsigned>(blocks), kStepThreads, kShared, stream,
      params);
  return true;
}

template <class T, class Bound>
bool launch_step(const DecodeStepParams& p, const Tensor& q, cudaStream_t stream) {
  bool launched = false;
  dispatch_head_dim(p.size.D, [&]<int D>(std::integral_constant<int, D>) {
    // Rows are copied in pieces of 16 bytes.
    if constexpr (kBoundsRowBytes<Bound, D> % 16 == 0) {
      launched = p.size.group() <= kMmaHeads ? launch_kernel<T, Bound, D, 1>(p, q, stream)
                                             : launch_kernel<T, Bound, D, kMaxHeadTiles>(p, q, stream);
    }
  });
  return launched;
}

}  // namespace quest::cuda
