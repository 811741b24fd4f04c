// Four operators in a row, after the checks of all of them: nothing is written before an error. Only the lengths and
// page numbers of append_kv are read again. The scores of a row stay in the cache until its pages are selected.
#include <torch/csrc/stable/library.h>

#include <memory>

#include "../checks.h"
#include "../four_operators.h"
#include "../mark_written.h"
#include "../namespace.h"
#include "checked_copies.h"
#include "steps.h"

namespace quest::cpu {

std::tuple<Tensor, Tensor, Tensor> decode_step(
    Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor k_bounds, Tensor page_table, Tensor start_lens,
    Tensor seq_lens, int64_t num_pages, int64_t group_reduce, int64_t sink_pages, int64_t recent_pages,
    std::optional<double> scale, std::optional<Tensor> k_scales, std::optional<Tensor> new_lens,
    std::optional<Tensor> budgets, std::optional<double> std_factor, std::optional<Tensor> counters) {
  DecodeStepParams p = check_decode_step(
      q, k, v, k_cache, v_cache, k_bounds, page_table, start_lens, seq_lens, num_pages, group_reduce, sink_pages,
      recent_pages, scale, k_scales, new_lens, budgets, std_factor, counters);
  const CheckedCopies copies(p);
  if (counters) mark_written({{"counters", *counters}});
  append_until(k, v, k_cache, v_cache, k_bounds, page_table, start_lens, new_lens, k_scales, std_factor, seq_lens);

  const int64_t B = p.size.B, T = p.size.T, Hq = p.size.Hq, P = p.paging.P;
  const auto scores = std::make_unique_for_overwrite<float[]>(B * T * Hq * P);
  const bool has_tokens = q.dim() == 4;
  const auto new_empty = [&](int64_t heads, int64_t last, ScalarType dtype) {
    return has_tokens ? torch::stable::new_empty(q, {B, T, heads, last}, dtype)
                      : torch::stable::new_empty(q, {B, heads, last}, dtype);
  };
  Tensor pages = new_empty(p.Hs, p.K, ScalarType::Int), out = new_empty(Hq, p.size.D, q.scalar_type());
  Tensor lse = has_tokens ? torch::stable::new_empty(q, {B, T, Hq}, ScalarType::Float)
                          : torch::stable::new_empty(q, {B, Hq}, ScalarType::Float);
  p.pages = static_cast<int32_t*>(pages.mutable_data_ptr());
  p.out = out.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  if (P > 0)
    score_pages(
        {.dtype = p.append.dtype,
         .size = p.size,
         .paging = p.paging,
         .q = p.q,
         .k_bounds = p.append.k_bounds,
         .scores = scores.get()});
  select_pages(
      {.size = p.size,
       .paging = p.paging,
       .scores = scores.get(),
       .stride_b = T * Hq * P,
       .stride_t = Hq * P,
       .stride_h = P,
       .Hs = p.Hs,
       .K = p.K,
       .sink_pages = p.sink_pages,
       .recent_pages = p.recent_pages,
       .reduce = p.reduce,
       .scale = p.scale,
       .budgets = p.budgets,
       .pages = p.pages});
  attend_pages(
      {.dtype = p.append.dtype,
       .size = p.size,
       .paging = p.paging,
       .q = p.q,
       .k_cache = p.append.k_cache,
       .v_cache = p.append.v_cache,
       .pages =
           {.data = p.pages,
            .stride_b = T * p.Hs * p.K,
            .stride_t = int64_t{p.Hs} * p.K,
            .stride_h = p.K,
            .Hs = p.Hs,
            .K = p.K},
       .scale = p.scale,
       .out = p.out,
       .lse = p.lse});
  return {out, lse, pages};
}

QUEST_LIBRARY_IMPL(CPU, m) { m.impl("decode_step", TORCH_BOX(&decode_step)); }

}  // namespace quest::cpu
