// The inner loops of the CPU kernels, over plain pointers. They are built once per instruction set (loops_*.cpp) and
// reached through a table that is chosen when it is first asked for. Elements become float32 on loading (a page's once
// for all the rows that read it), so that everything after that is one loop for all dtypes.
//
// Each result depends on its own row only: rows may be grouped at will without changing a bit.
#pragma once

#include <cstdint>

// Nothing else is included: an inline function from elsewhere, compiled in loops_avx512.cpp, could be the copy that the
// linker keeps for the whole library.

namespace quest {
enum class DType : int32_t;
}

namespace quest::cpu {

struct Loops {
  const char* name;

  // float32 from and to each DType. Strides are in elements; dst of load is [rows, D] contiguous.
  void (*load[3])(const void* src, int64_t stride, int rows, int D, float* dst);
  void (*store[3])(const float* src, int n, void* dst);

  // Elementwise minimum and maximum over n >= 1 rows, by DType; NaN wins.
  void (*bounds[3])(const void* keys, int64_t stride, int n, int D, float* lower, float* upper);

  // out[r, j] = scale * (q[r] . keys[j]); q [rows, D] contiguous, keys [n, D], out [rows, n]. D a multiple of 16.
  void (*dots)(
      const float* q, int rows, const float* keys, int64_t stride, int n, int D, float scale, float* out,
      int64_t out_stride);

  // out[r] += sum_j weights[r, j] * values[j]; out [rows, D] contiguous.
  void (*accumulate)(
      const float* weights, int64_t weights_stride, int rows, const float* values, int64_t stride, int n, int D,
      float* out);

  float (*max)(const float* x, int n);                   // -inf where n = 0; NaN wins
  float (*exp_sum)(float* x, int n, float subtract);     // x = exp(x - subtract), for x <= subtract; their sum
};

// QUEST_OPS_CPU_ISA = generic, avx2 or avx512 asks for no more than that instruction set.
const Loops& loops();
const char* isa_name();

inline int dtype_index(DType dtype) { return static_cast<int>(dtype); }

namespace generic {
extern const Loops kLoops;
}
namespace avx2 {
extern const Loops kLoops;
}
namespace avx512 {
extern const Loops kLoops;
}

}  // namespace quest::cpu
