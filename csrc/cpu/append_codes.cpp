// Codes of new keys, a task for each token and KV head.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <limits>

#include "../checks.h"
#include "../mark_written.h"
#include "../namespace.h"
#include "checked_copies.h"
#include "elements.h"
#include "rotate.h"
#include "simd/loops.h"

namespace quest::cpu {

// The sum of squares: of halves of the elements, then of halves of those sums, and so on. A warp sums likewise.
static float sum_squares(const float* x, int D) {
  float sums[kMaxHeadDim] = {};
  for (int d = 0; d < D; ++d) sums[d] = x[d] * x[d];
  for (int half = kMaxHeadDim / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0];
}

// The bytes of a key, and the scale.
static float encode(float* key, int D, uint8_t* bytes) {
  rotate(key, D);
  const float step = std::sqrt(sum_squares(key, D) / static_cast<float>(D)) * kCodeStep;
  const bool finite = step < std::numeric_limits<float>::infinity();
  for (int d = 0; d < D; d += 4) {
    int byte = 0;
    for (int i = 0; finite && i < 4; ++i) byte |= key_code(key[d + i], step) << 2 * i;
    bytes[d / 4] = static_cast<uint8_t>(byte);
  }
  return finite ? step * (0.5f * static_cast<float>(rotation_scale(D))) : std::numeric_limits<float>::quiet_NaN();
}

static void append_code(const AppendCodesParams& p, const Loops& loops, int b, int t, int h) {
  if (t >= p.new_tokens(b)) return;
  const int64_t token = int64_t{p.paging.length(b)} + t;
  if (token >= p.paging.capacity()) return;
  const int64_t page = p.paging.physical(b, static_cast<int32_t>(token >> p.paging.page_shift));
  const int64_t slot = token & (p.paging.page_size() - 1);
  if (page < 0) return;
  float key[kMaxHeadDim];
  loops.load[dtype_index(p.dtype)](
      element(p.k.data, b * p.k.stride_b + t * p.k.stride_t + h * p.k.stride_h, p.dtype), p.size.D, key);
  const KeyCodes& to = p.codes;
  to.scales[page * to.scales_stride_n + h * to.scales_stride_h + slot * to.scales_stride_s] =
      encode(key, p.size.D, to.data + page * to.stride_n + h * to.stride_h + slot * to.stride_s);
}

void append_codes(
    Tensor k, Tensor k_codes, Tensor code_scales, Tensor page_table, Tensor seq_lens, std::optional<Tensor> new_lens) {
  AppendCodesParams p = check_append_codes(k, k_codes, code_scales, page_table, seq_lens, new_lens);
  const CheckedCopies copies(p);
  mark_written({{"k_codes", k_codes}, {"code_scales", code_scales}});
  const auto [B, T, Hq, Hkv, D] = p.size;
  const Loops& loops = cpu::loops();
  torch::stable::parallel_for(0, int64_t{B} * T * Hkv, grain(8 * D), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      append_code(p, loops, static_cast<int>(i / Hkv / T), static_cast<int>(i / Hkv % T), static_cast<int>(i % Hkv));
  });
}

QUEST_LIBRARY_IMPL(CPU, m) { m.impl("append_codes", TORCH_BOX(&append_codes)); }

}  // namespace quest::cpu
