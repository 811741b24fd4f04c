// The inner loops of the CPU kernels, over plain pointers. Each instruction set has a build of them (loops_*.cpp), and
// a table of function pointers that is chosen once. Elements become float32 as they are loaded, once for up to four
// queries.
//
// A query's result does not depend on the queries beside it: they may be grouped at will without changing a bit.
#pragma once

#include <cstdint>

// No other header is included here. The linker keeps one copy of an inline function for the whole library, and a copy
// from loops_avx512.cpp would not run everywhere.

namespace quest {
enum class DType : int32_t;
}

namespace quest::cpu {

// Values are summed in blocks, and then the blocks.
inline constexpr int kBlock = 16;
// `dots` and `accumulate` prefetch tokens that many places ahead, so this many more pointers follow each array of
// tokens. They are not loaded from.
inline constexpr int kAhead = 32;

// A query, or a head's output, between load_query and store_output is in an order that only `dots` and `accumulate`
// know. An array has one loop for each DType, in its order.
struct Loops {
  const char* name;

  // n and D are multiples of 16, here and below.
  void (*load[3])(const void* src, int n, float* dst);
  void (*store[3])(const float* src, int n, void* dst);

  void (*load_query[3])(const void* src, int D, float* q);
  void (*store_output[3])(const float* out, int D, void* dst);

  // out[i, j] = scale * (q[i] . keys[j]) for n keys; q [queries, D] contiguous, out [queries, n] with out_stride.
  void (*dots[3])(
      const float* q, int queries, const void* const* keys, int n, int D, float scale, float* out, int64_t out_stride);

  // out[i] += sum_j weights[i, j] * values[j] for n values, in their order; weights [queries, n], out [queries, D]
  // contiguous.
  void (*accumulate[3])(
      const float* weights, int64_t weights_stride, int queries, const void* const* values, int n, int D, float* out);

  // A query as `score` reads it, from its floats. Its bytes are a multiple of 64, and so must be its address.
  int64_t (*query_bytes)(int D);
  void (*split_query)(const float* q, int D, void* parts);

  // out[i, j] = scales[j] * sum_d max(q[i, d] * lower[j, d], q[i, d] * upper[j, d]) for n pages; queries contiguous,
  // out [count, n] with out_stride. Without scales they are 1. The last is for int8 bounds.
  void (*score[4])(
      const void* queries, int count, const void* const* lower, const void* const* upper, const float* scales, int n,
      int D, float* out, int64_t out_stride);

  // out[i, j] = scales[j] * (q[i] . levels[j]) for n keys, whose rows of codes are `stride` bytes apart. A query is its
  // D high parts, then its D low parts (see key_codes.h); out [queries, n] with out_stride.
  void (*score_codes)(
      const float* q, int queries, const uint8_t* codes, int64_t stride, const float* scales, int64_t scales_stride,
      int n, int D, float* out, int64_t out_stride);

  // Elementwise minimum and maximum over n >= 1 keys; NaN wins.
  void (*bounds[3])(const void* keys, int64_t stride, int n, int D, float* lower, float* upper);

  // Bounds as multiples of *scale, rounded outward so that they stay bounds. The scale is the largest magnitude / 127,
  // rounded up; where it is 0 or not finite the multiples are 0.
  void (*store_int8)(const float* lower, const float* upper, int D, int8_t* low, int8_t* high, float* scale);

  float (*max)(const float* x, int n);                // -inf where n = 0; NaN wins
  float (*exp_sum)(float* x, int n, float subtract);  // x = exp(x - subtract), for x <= subtract; their sum
};

// The build for the best instruction set of this processor, or for the one that QUEST_OPS_ISA names. A name that is not
// of this processor is an error, so call this before a parallel region, which would lose the message.
const Loops& loops();
const char* isa_name();

inline int dtype_index(DType dtype) { return static_cast<int>(dtype); }
inline constexpr int kInt8 = 3;  // index in `score`

namespace generic {
extern const Loops kLoops;
}
namespace avx2 {
extern const Loops kLoops;
}
namespace avx512 {
extern const Loops kLoops;
}
namespace avx512_vnni {
extern const Loops kLoops;
}

}  // namespace quest::cpu
