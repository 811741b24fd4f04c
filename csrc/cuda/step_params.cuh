// What the blocks of decode_step (decode_step.cuh) are given, and share.
#pragma once

#include "launch_order.cuh"
#include "row_mma.cuh"

namespace quest::cuda {

constexpr int kStepThreads = 256;
constexpr int kStepWarps = kStepThreads / kWarpSize;
constexpr int kMostSequences = kStepThreads;
constexpr int kMostListed = 512;  // pages of a run

// How far a row is.
struct RowProgress {
  int scored;    // stretches, for the first row of those that are scored together
  int attended;  // runs
};

// All of it zero when the kernel starts.
struct alignas(8) StepProgress {
  int stretches, runs;  // taken so far
  RowProgress rows[1];
};

struct StepParams {
  AppendParams append;  // paging.seq_lens: tokens before the step
  Sizes size;
  Paging paging;  // seq_lens: tokens with the new one
  Query q;
  int32_t K, sink_pages, recent_pages;
  GroupReduce reduce;
  float scale;
  int32_t* pages;       // [B, Hkv, K] contiguous
  void* out;            // [B, Hq, D] contiguous
  float* lse;           // [B, Hq]
  int32_t score_shift;  // 1 << it heads are scored together: 8, or a smaller power of two that divides Hkv
  int32_t part_chunks;  // that are folded before they are stored: one, or a span's
  int32_t most_parts;   // of a row
  StepProgress* progress;
  uint32_t* keys;  // [rows, keys_stride]
  int64_t keys_stride;
  float* outs;   // [rows, most_parts, G, D]
  float2* sums;  // [rows, most_parts, G]: largest score, sum of weights
};

__device__ __forceinline__ int load_acquire(const int* from) {
  int x;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
  return x;
}
// Waits until *at is `least`; what was there before it became so is then there for this thread.
__device__ __forceinline__ void wait_for(const int* at, int least) {
  while (load_acquire(at) < least) {
  }
}
// What this thread wrote, and all that it saw before, is there for who reads the sum.
__device__ __forceinline__ void add_release(int* to, int x) {
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(to), "r"(x) : "memory");
}
__device__ __forceinline__ int add_acquire_release(int* to, int x) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], %2;" : "=r"(before) : "l"(to), "r"(x) : "memory");
  return before;
}

struct ClearParams {
  int* progress;
  int64_t count;
};
__global__ void __launch_bounds__(kStepThreads) clear_progress_kernel(const ClearParams p) {
  start_next_kernel();  // which has blocks to put in place, and waits for what is done here
  wait_for_previous_kernel();
  for (int64_t i = threadIdx.x; i < p.count; i += kStepThreads) p.progress[i] = 0;
}

}  // namespace quest::cuda
