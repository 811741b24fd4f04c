// Four operators in a row, after the checks of all of them: nothing is written before an error.
#include <torch/csrc/stable/library.h>

#include "../checks.h"
#include "../four_operators.h"
#include "../namespace.h"
#include "checked_copies.h"

namespace quest::cpu {

std::tuple<Tensor, Tensor, Tensor> decode_step(
    Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor k_bounds, Tensor page_table, Tensor start_lens,
    Tensor seq_lens, int64_t num_pages, int64_t group_reduce, int64_t sink_pages, int64_t recent_pages,
    std::optional<double> scale, std::optional<Tensor> k_scales, std::optional<Tensor> new_lens,
    std::optional<Tensor> budgets, std::optional<double> std_factor) {
  DecodeStepParams p = check_decode_step(
      q, k, v, k_cache, v_cache, k_bounds, page_table, start_lens, seq_lens, num_pages, group_reduce, sink_pages,
      recent_pages, scale, k_scales, new_lens, budgets, std_factor);
  const CheckedCopies copies(p);
  return four_operators(
      q, k, v, k_cache, v_cache, k_bounds, page_table, start_lens, seq_lens, num_pages, group_reduce, sink_pages,
      recent_pages, p.scale, k_scales, new_lens, budgets, std_factor);
}

QUEST_LIBRARY_IMPL(CPU, m) { m.impl("decode_step", TORCH_BOX(&decode_step)); }

}  // namespace quest::cpu
