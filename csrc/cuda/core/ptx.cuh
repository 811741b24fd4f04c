// All inline PTX, for instructions that neither CUDA's headers nor CuTe and CCCL expose as the kernels need them.
// CuTe's cp.async wrappers ask for 128 bytes in L2, and its waits have no memory clobber.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <cuda/atomic>

namespace quest::cuda {

// Programmatic dependent launch. A kernel may start while its predecessor drains, so it waits before it touches memory.
// Never launch with that attribute a kernel without the wait.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}
__device__ __forceinline__ void start_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ unsigned shared_address(const void* in_shared) {
  return static_cast<unsigned>(__cvta_generic_to_shared(in_shared));
}

// Asynchronous copies from device to shared memory (cp.async).

__device__ __forceinline__ void copy_async_16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
// Writes zeros where `exists` is false; `from` must be a valid address all the same.
__device__ __forceinline__ void copy_async_16_or_zeros(unsigned to, uint64_t from, bool exists) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(static_cast<int>(exists) * 16)
               : "memory");
}
__device__ __forceinline__ void copy_async_4(void* to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
// Closes the group of copies issued since the last call; the group may be empty.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits for all groups of this warp but the latest kLatest.
template <int kLatest>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLatest) : "memory");
  __syncwarp();
}

// 16 bytes that are read once, or zeros. Not a read-only load: another block of the same kernel may have written them.
__device__ __forceinline__ uint4 load_once(const void* from, bool exists) {
  uint4 x;
  asm volatile(
      "{\n"
      "  .reg .pred exists;\n"
      "  setp.ne.u32 exists, %5, 0;\n"
      "  mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;\n"
      "  @exists ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
      "}"
      : "=&r"(x.x), "=&r"(x.y), "=&r"(x.z), "=&r"(x.w)
      : "l"(from), "r"(static_cast<unsigned>(exists)));
  return x;
}
// The same of 8 bytes.
__device__ __forceinline__ uint2 load_once_8(const void* from, bool exists) {
  uint2 x;
  asm volatile(
      "{\n"
      "  .reg .pred exists;\n"
      "  setp.ne.u32 exists, %3, 0;\n"
      "  mov.u32 %0, 0; mov.u32 %1, 0;\n"
      "  @exists ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];\n"
      "}"
      : "=&r"(x.x), "=&r"(x.y)
      : "l"(from), "r"(static_cast<unsigned>(exists)));
  return x;
}
__device__ __forceinline__ void prefetch_l2(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

// 2^x by the special-function unit, with subnormal results flushed to zero.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Adds 1 to the counter at a shared address if x <= limit: predicated, so that a loop over keys does not branch.
__device__ __forceinline__ void count_if_at_most(uint32_t x, uint32_t limit, unsigned counter) {
  asm volatile("{.reg .pred p; setp.le.u32 p, %0, %1; @p red.shared.add.u32 [%2], 1;}" ::"r"(x), "r"(limit),
               "r"(counter)
               : "memory");
}

// Makes the compiler take a value for changed, so that it does not keep in registers what is computed from it.
__device__ __forceinline__ void forget_origin(uint4& x) {
  asm volatile("" : "+r"(x.x), "+r"(x.y), "+r"(x.z), "+r"(x.w));
}
__device__ __forceinline__ void forget_origin(uint2& x) { asm volatile("" : "+r"(x.x), "+r"(x.y)); }

// Counters in device memory by which blocks of one kernel hand over work.

__device__ __forceinline__::cuda::atomic_ref<int, ::cuda::thread_scope_device> device_atomic(int* counter) {
  return ::cuda::atomic_ref<int, ::cuda::thread_scope_device>(*counter);
}
// Waits until a counter is `least` past `base`, or more, modulo 2^32. Writes that other threads made before they
// released it are visible to this thread afterwards.
__device__ __forceinline__ void wait_until_at_least(int* counter, unsigned least, unsigned base) {
  while (static_cast<unsigned>(device_atomic(counter).load(::cuda::memory_order_acquire)) - base < least) {
  }
}
// Publishes what this thread wrote, and what it saw of other threads' writes, with the addition.
__device__ __forceinline__ void add_release(int* counter, int x) {
  device_atomic(counter).fetch_add(x, ::cuda::memory_order_release);
}
__device__ __forceinline__ int add_acquire_release(int* counter, int x) {
  return device_atomic(counter).fetch_add(x, ::cuda::memory_order_acq_rel);
}

}  // namespace quest::cuda
