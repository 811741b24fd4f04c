// The contract: every operator's schema. Shapes, words and behaviour are in docs/operators.md; the checks that every
// kernel makes are in checks.h. Sizes taken from tensors are SymInt, so that a new size compiles nothing anew.
#include <torch/csrc/stable/library.h>

#include "namespace.h"

QUEST_LIBRARY(m) {
  // k, v [B, T, Hkv, D] go behind what each sequence holds (seq_lens [B]: tokens before the call); new_lens [B] of the
  // T are real. The bounds of every page touched are recomputed from its keys.
  m.def(
      "append_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) k_bounds, "
      "Tensor page_table, Tensor seq_lens, Tensor? new_lens=None, Tensor(d!)? k_scales=None) -> ()");

  // Bounds of the pages from the one that holds first_token [B] (default: the first page) to the last.
  m.def(
      "update_bounds(Tensor k_cache, Tensor(a!) k_bounds, Tensor page_table, Tensor seq_lens, "
      "Tensor? first_token=None, Tensor(b!)? k_scales=None) -> ()");

  // q [B, Hq, D] or [B, T, Hq, D] -> scores [B, Hq, P] or [B, T, Hq, P], float32: an upper bound of q.k for each page.
  m.def(
      "estimate(Tensor q, Tensor k_bounds, Tensor page_table, Tensor seq_lens, int page_size, Tensor? k_scales=None) "
      "-> Tensor");

  // scores -> pages [B, Hs, K] or [B, T, Hs, K], int32. group_reduce: 0 none (Hs = Hq), 1 max, 2 sum, 3 soft.
  // scale: of the scores before the softmax of soft.
  m.def(
      "topk_pages(Tensor scores, Tensor seq_lens, int page_size, SymInt k, SymInt num_kv_heads, int group_reduce=1, "
      "int sink_pages=0, int recent_pages=1, float scale=1.0) -> Tensor");

  // Attention over the selected pages, or over all where pages is None -> out like q, lse [B, Hq] or [B, T, Hq]
  // float32.
  m.def(
      "sparse_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor seq_lens, "
      "Tensor? pages=None, float? scale=None) -> (Tensor out, Tensor lse)");

  // The step of a layer in one call: append_kv with start_lens, then estimate, topk_pages and sparse_decode with
  // seq_lens = start_lens + T -> out and lse of sparse_decode, pages of topk_pages.
  m.def(
      "decode_step(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) k_bounds, "
      "Tensor page_table, Tensor start_lens, Tensor seq_lens, SymInt num_pages, int group_reduce=1, int sink_pages=0, "
      "int recent_pages=1, float? scale=None, Tensor(d!)? k_scales=None) -> (Tensor out, Tensor lse, Tensor pages)");
}
