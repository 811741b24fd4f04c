// Four operators in a row, after the checks of all of them: nothing is written before an error. Only the lengths and
// page numbers of append_kv are read again. The scores of a row stay in the cache until its pages are selected.
#include <torch/csrc/stable/library.h>

#include <memory>
#include <vector>

#include "../checks.h"
#include "../four_operators.h"
#include "../kept_pages.h"
#include "../mark_written.h"
#include "../namespace.h"
#include "checked_copies.h"
#include "steps.h"

namespace quest::cpu {

namespace {

// The lists of a step: the operator's result, or memory of their own beside kept lists, which are read once.
class SelectedLists {
 public:
  SelectedLists(const DecodeStepParams& p, int32_t* result) : pages(result), selecting(p.paging), p_(p) {
    if (!p.kept.pages) return;
    const int32_t B = p.size.B;
    own_.resize(int64_t{B} * p.Hs * p.K), lens_.resize(B);
    pages = own_.data();
    for (int32_t b = 0; b < B; ++b) lens_[b] = keeps(b) ? 0 : p.paging.seq_lens[b];
    selecting.seq_lens = lens_.data();
  }

  // After the selection: completes the lists of sequences that keep theirs, and keeps those of the others.
  void keep() const {
    if (!p_.kept.pages) return;
    for (int32_t b = 0; b < p_.size.B; ++b)
      for (int32_t h = 0; h < p_.Hs; ++h)
        for (int32_t i = 0; i < p_.K; ++i) keep_page(p_, b, h, i, pages + (int64_t{b} * p_.Hs + h) * p_.K);
  }

  int32_t* pages;    // [B, T, Hs, K] contiguous
  Paging selecting;  // its lengths are 0 where no page is to be scored

 private:
  bool keeps(int32_t b) const {
    const int32_t length = p_.paging.visible(b, 0, 1);
    return p_.kept.keeps(b) && p_.paging.pages_of(length) > pages_to_select(p_, b, length);
  }

  const DecodeStepParams& p_;
  std::vector<int32_t> own_, lens_;
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor> decode_step(
    Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor k_bounds, Tensor page_table, Tensor start_lens,
    Tensor seq_lens, int64_t num_pages, int64_t group_reduce, int64_t sink_pages, int64_t recent_pages,
    std::optional<double> scale, std::optional<Tensor> k_scales, std::optional<Tensor> new_lens,
    std::optional<Tensor> budgets, std::optional<double> std_factor, std::optional<Tensor> counters,
    std::optional<Tensor> kept_pages, std::optional<Tensor> kept_steps, int64_t reselect_every, int64_t dense_below) {
  DecodeStepParams p = check_decode_step(
      q, k, v, k_cache, v_cache, k_bounds, page_table, start_lens, seq_lens, num_pages, group_reduce, sink_pages,
      recent_pages, scale, k_scales, new_lens, budgets, std_factor, counters, kept_pages, kept_steps, reselect_every,
      dense_below);
  const CheckedCopies copies(p);
  if (counters) mark_written({{"counters", *counters}});
  if (kept_pages) mark_written({{"kept_pages", *kept_pages}});
  append_until(k, v, k_cache, v_cache, k_bounds, page_table, start_lens, new_lens, k_scales, std_factor, seq_lens);

  const int64_t B = p.size.B, T = p.size.T, Hq = p.size.Hq, P = p.paging.P;
  const bool has_tokens = q.dim() == 4;
  const auto new_empty = [&](int64_t heads, int64_t last, ScalarType dtype) {
    return has_tokens ? torch::stable::new_empty(q, {B, T, heads, last}, dtype)
                      : torch::stable::new_empty(q, {B, heads, last}, dtype);
  };
  Tensor pages = new_empty(p.Hs, p.dense || kept_pages ? 0 : p.K, ScalarType::Int);
  Tensor out = new_empty(Hq, p.size.D, q.scalar_type());
  Tensor lse = has_tokens ? torch::stable::new_empty(q, {B, T, Hq}, ScalarType::Float)
                          : torch::stable::new_empty(q, {B, Hq}, ScalarType::Float);
  DecodeParams attention{
      .dtype = p.append.dtype,
      .size = p.size,
      .paging = p.paging,
      .q = p.q,
      .k_cache = p.append.k_cache,
      .v_cache = p.append.v_cache,
      .pages = {.Hs = p.size.Hkv, .K = p.paging.P},
      .scale = p.scale,
      .out = out.mutable_data_ptr(),
      .lse = static_cast<float*>(lse.mutable_data_ptr())};
  if (p.dense) {
    attend_pages(attention);
    return {out, lse, pages};
  }
  const SelectedLists lists(p, static_cast<int32_t*>(pages.mutable_data_ptr()));
  const auto scores = std::make_unique_for_overwrite<float[]>(B * T * Hq * P);
  if (P > 0)
    score_pages(
        {.dtype = p.append.dtype,
         .size = p.size,
         .paging = lists.selecting,
         .q = p.q,
         .k_bounds = p.append.k_bounds,
         .scores = scores.get()});
  select_pages(
      {.size = p.size,
       .paging = lists.selecting,
       .scores = scores.get(),
       .stride_b = T * Hq * P,
       .stride_t = Hq * P,
       .stride_h = P,
       .Hs = p.Hs,
       .K = p.K,
       .sink_pages = p.sink_pages,
       .recent_pages = p.recent_pages,
       .num_pages = p.num_pages,
       .dense_below = p.dense_below,
       .reduce = p.reduce,
       .scale = p.scale,
       .budgets = p.budgets,
       .pages = lists.pages});
  lists.keep();
  attention.pages = {
      .data = lists.pages,
      .stride_b = T * p.Hs * p.K,
      .stride_t = int64_t{p.Hs} * p.K,
      .stride_h = p.K,
      .Hs = p.Hs,
      .K = p.K};
  attend_pages(attention);
  return {out, lse, pages};
}

QUEST_LIBRARY_IMPL(CPU, m) { m.impl("decode_step", TORCH_BOX(&decode_step)); }

}  // namespace quest::cpu
