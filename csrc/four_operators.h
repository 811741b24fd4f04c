// decode_step by its definition: the four operators of a step in a row. The build sets QUEST_BACKEND, the namespace of
// their kernels: cpu or cuda.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace quest::QUEST_BACKEND {

using torch::stable::Tensor;

void append_kv(
    Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor k_bounds, Tensor page_table, Tensor seq_lens,
    std::optional<Tensor> new_lens, std::optional<Tensor> k_scales, std::optional<double> std_factor);
// append_kv that writes nothing behind end_lens [B] tokens.
void append_until(
    Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor k_bounds, Tensor page_table, Tensor seq_lens,
    std::optional<Tensor> new_lens, std::optional<Tensor> k_scales, std::optional<double> std_factor,
    std::optional<Tensor> end_lens);
Tensor estimate(
    Tensor q, Tensor k_bounds, Tensor page_table, Tensor seq_lens, int64_t page_size, std::optional<Tensor> k_scales,
    std::optional<Tensor> new_lens);
Tensor topk_pages(
    Tensor scores, Tensor seq_lens, int64_t page_size, int64_t k, int64_t num_kv_heads, int64_t group_reduce,
    int64_t sink_pages, int64_t recent_pages, double scale, std::optional<Tensor> new_lens,
    std::optional<Tensor> budgets, int64_t dense_below);
std::tuple<Tensor, Tensor> sparse_decode(
    Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor seq_lens, std::optional<Tensor> pages,
    std::optional<double> scale, std::optional<Tensor> new_lens);

// keep(pages) may change the selected lists before they are read, and returns those to return.
template <class Keep>
std::tuple<Tensor, Tensor, Tensor> four_operators(
    Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor k_bounds, Tensor page_table, Tensor start_lens,
    Tensor seq_lens, int64_t num_pages, int64_t group_reduce, int64_t sink_pages, int64_t recent_pages, double scale,
    std::optional<Tensor> k_scales, std::optional<Tensor> new_lens, std::optional<Tensor> budgets,
    std::optional<double> std_factor, int64_t dense_below, const Keep& keep) {
  append_until(k, v, k_cache, v_cache, k_bounds, page_table, start_lens, new_lens, k_scales, std_factor, seq_lens);
  const int64_t page_size = k_cache.size(2);
  const Tensor scores = estimate(q, k_bounds, page_table, seq_lens, page_size, k_scales, new_lens);
  Tensor pages = topk_pages(
      scores, seq_lens, page_size, num_pages, k_cache.size(1), group_reduce, sink_pages, recent_pages, scale, new_lens,
      budgets, dense_below);
  Tensor result = keep(pages);
  auto [out, lse] = sparse_decode(q, k_cache, v_cache, page_table, seq_lens, pages, scale, new_lens);
  return {out, lse, result};
}

}  // namespace quest::QUEST_BACKEND
