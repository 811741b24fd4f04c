// The four operators in a row.
#include <torch/csrc/stable/library.h>

#include "../checks.h"
#include "../namespace.h"
#include "ops.h"

namespace quest::cpu {

std::tuple<Tensor, Tensor, Tensor> decode_step(
    Tensor q, Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor k_bounds, Tensor page_table, Tensor start_lens,
    Tensor seq_lens, int64_t num_pages, int64_t group_reduce, int64_t sink_pages, int64_t recent_pages,
    std::optional<double> scale, std::optional<Tensor> k_scales) {
  const DecodeStepParams p = check_decode_step(
      q, k, v, k_cache, v_cache, k_bounds, page_table, start_lens, seq_lens, num_pages, group_reduce, sink_pages,
      recent_pages, scale, k_scales);
  check_values(p);
  append_kv(k, v, k_cache, v_cache, k_bounds, page_table, start_lens, std::nullopt, k_scales);
  const int64_t page_size = k_cache.size(2);
  const Tensor scores = estimate(q, k_bounds, page_table, seq_lens, page_size, k_scales);
  Tensor pages = topk_pages(
      scores, seq_lens, page_size, num_pages, k_cache.size(1), group_reduce, sink_pages, recent_pages, p.scale);
  auto [out, lse] = sparse_decode(q, k_cache, v_cache, page_table, seq_lens, pages, p.scale);
  return {out, lse, pages};
}

QUEST_LIBRARY_IMPL(CPU, m) { m.impl("decode_step", TORCH_BOX(&decode_step)); }

}  // namespace quest::cpu
