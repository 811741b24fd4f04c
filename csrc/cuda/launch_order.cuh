// Programmatic dependent launch: a kernel may be launched while the one before it drains. Each of ours that is launched
// so waits before it touches memory; none is launched so without the wait.
#pragma once

namespace quest::cuda {

__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void start_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace quest::cuda
