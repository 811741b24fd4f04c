// decode_step: append, estimate, selection and attention of one new token in one launch.
//
// A row is a sequence and KV head. The scheduler cuts the rows into score splits and attend splits, about as many of
// the latter as there are resident blocks. Blocks take score splits until none is left, then attend splits. An attend
// split waits for its row's score splits, selects the row's pages, and leaves partials. The block that finishes a row's
// last attend split combines them. A row that reads all its pages, or an earlier list, has no score splits. A block
// waits only for splits that running blocks have taken, so the kernel cannot deadlock, however few blocks are resident.
//
// The pieces are those of estimate, topk_pages and sparse_decode, and so are the bits. Cold code stalls on instruction
// fetch, so there is one copy of each piece, and loops stay rolled.
#pragma once

#include "attend.cuh"
#include "score.cuh"

namespace quest::cuda {

template <class T, class Bound, int D, int kHeadTiles>
struct DecodeStep {
  static constexpr int kSlotBytes = MmaAttend<T, D>::shared_bytes(D);
  using Scorer = PageScorer<T, Bound, D, kSlotBytes, kHeadTiles>;
  using Attender = RowAttender<T, D, kSlotBytes, kHeadTiles>;

  // The whole dynamic shared memory of a block.
  struct Memory {
    SelectMemory<kSlotBytes> select;  // first: SelectMemory::get() finds it there
    typename Scheduler<kHeadTiles>::Shared scheduler;
    typename Scorer::Shared score;
    typename Attender::Shared attend;
  };
  static_assert(offsetof(Memory, select) == 0);
};

template <class T, class Bound, int D, int kHeadTiles>
__global__ void __launch_bounds__(kStepThreads, D <= 128 ? 2 : 1)
    decode_step_kernel(const __grid_constant__ DecodeStepKernelParams params) {
  using Step = DecodeStep<T, Bound, D, kHeadTiles>;
  extern __shared__ __align__(16) std::byte dynamic[];
  auto& memory = *reinterpret_cast<typename Step::Memory*>(dynamic);

  wait_for_previous_kernel();
  Scheduler<kHeadTiles> scheduler(params, memory.scheduler);
  scheduler.cut();
  typename Step::Scorer{scheduler, memory.score, memory.select.slots}.run();
  start_next_kernel();
  typename Step::Attender{scheduler, memory.attend, memory.select.slots}.run();
}

}  // namespace quest::cuda
