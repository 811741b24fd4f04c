// The inner loops of the CPU kernels, over plain pointers. They are built once per instruction set (loops_*.cpp) and
// reached through a table that is chosen when it is first asked for. Elements become float32 as they are loaded, once
// for up to four rows that read them.
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

// Values are summed by blocks of so many, and then the blocks.
inline constexpr int kBlock = 16;

// An array has one loop for each DType, in its order.
struct Loops {
  const char* name;

  // n a multiple of 16, as D is below.
  void (*load[3])(const void* src, int n, float* dst);
  void (*store[3])(const float* src, int n, void* dst);

  // out[r, j] = scale * (q[r] . keys[j]) for n keys; q [rows, D] contiguous, out [rows, n]. The last is for signed
  // bytes.
  void (*dots[4])(
      const float* q, int rows, const void* const* keys, int n, int D, float scale, float* out, int64_t out_stride);

  // out[r] += sum_j weights[r, j] * values[j] for n values, in their order; weights [rows, n], out [rows, D]
  // contiguous.
  void (*accumulate[3])(
      const float* weights, int64_t weights_stride, int rows, const void* const* values, int n, int D, float* out);

  // Elementwise minimum and maximum over n >= 1 keys; NaN wins.
  void (*bounds[3])(const void* keys, int64_t stride, int n, int D, float* lower, float* upper);

  float (*max)(const float* x, int n);                // -inf where n = 0; NaN wins
  float (*exp_sum)(float* x, int n, float subtract);  // x = exp(x - subtract), for x <= subtract; their sum
};

// QUEST_OPS_CPU_ISA = generic, avx2 or avx512 asks for no more than that instruction set.
const Loops& loops();
const char* isa_name();

inline int dtype_index(DType dtype) { return static_cast<int>(dtype); }
inline constexpr int kBytes = 3;  // where `dots` has the loop for signed bytes

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
