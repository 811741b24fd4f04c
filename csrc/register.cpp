// The contract: every operator's schema. docs/operators.md has shapes and behaviour, checks.h the requirements. Sizes
// that come from tensors are SymInt, so that torch.compile does not recompile for a new size.
#include <torch/csrc/stable/library.h>

#include "namespace.h"

QUEST_LIBRARY(m) {
  // Writes k, v [B, T, Hkv, D] behind the seq_lens [B] tokens of each sequence; new_lens [B] of the T are real. The
  // bounds of every page touched are recomputed from its keys: minimum and maximum, or mean -+ std_factor * std.
  m.def(
      "append_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) k_bounds, "
      "Tensor page_table, Tensor seq_lens, Tensor? new_lens=None, Tensor(d!)? k_scales=None, float? std_factor=None) "
      "-> ()");

  // Recomputes the bounds of each sequence's pages, from the page of first_token [B] (default: the first) to the last.
  m.def(
      "update_bounds(Tensor k_cache, Tensor(a!) k_bounds, Tensor page_table, Tensor seq_lens, "
      "Tensor? first_token=None, Tensor(b!)? k_scales=None, float? std_factor=None) -> ()");

  // A score for each page, which is an upper bound of q.k where the bounds are minimum and maximum: q [B, Hq, D] ->
  // scores [B, Hq, P] float32. With T new tokens, q [B, T, Hq, D] -> scores [B, T, Hq, P], and likewise below. The
  // first new_lens [B] of the T are real.
  m.def(
      "estimate(Tensor q, Tensor k_bounds, Tensor page_table, Tensor seq_lens, int page_size, Tensor? k_scales=None, "
      "Tensor? new_lens=None) -> Tensor");

  // The k best pages: scores -> pages [B, Hs, K] int32. group_reduce is 0 none (Hs = Hq), 1 max, 2 sum or 3 soft. scale
  // multiplies the scores before the softmax of soft. A sequence selects budgets [B] pages, k at most. One of at most
  // dense_below tokens selects all its pages, for which K may exceed k.
  m.def(
      "topk_pages(Tensor scores, Tensor seq_lens, int page_size, SymInt k, SymInt num_kv_heads, int group_reduce=1, "
      "int sink_pages=0, int recent_pages=1, float scale=1.0, Tensor? new_lens=None, Tensor? budgets=None, "
      "int dense_below=0) -> Tensor");

  // Writes codes of k [B, T, Hkv, D] behind the seq_lens [B] tokens of each sequence. k_codes [N, Hkv, S, D / 4] uint8
  // has 2 bits for each dimension of the rotated key. code_scales is [N, Hkv, S] float32. new_lens [B] of the T are
  // real.
  m.def(
      "append_codes(Tensor k, Tensor(a!) k_codes, Tensor(b!) code_scales, Tensor page_table, Tensor seq_lens, "
      "Tensor? new_lens=None) -> ()");

  // Scores the listed pages again, by the codes of their tokens -> scores [B, Hq, P] float32, -inf for other pages.
  // token_reduce 0 takes the largest score of a page's tokens. 1 takes their log-sum-exp: of scores times scale, over
  // scale.
  m.def(
      "rerank_pages(Tensor q, Tensor k_codes, Tensor code_scales, Tensor page_table, Tensor seq_lens, Tensor pages, "
      "int token_reduce=0, float scale=1.0, Tensor? new_lens=None) -> Tensor");

  // Attention over the selected pages, or all pages where None -> out like q, lse [B, Hq] float32.
  m.def(
      "sparse_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor seq_lens, "
      "Tensor? pages=None, float? scale=None, Tensor? new_lens=None) -> (Tensor out, Tensor lse)");

  // A layer's step in one call. append_kv runs with start_lens; estimate, topk_pages and sparse_decode run with
  // seq_lens, which are start_lens + T or new_lens. Returns out and lse of sparse_decode, and pages of topk_pages.
  // num_pages 0 reads every page, and there are no lists. A sequence whose seq_lens is 0 is idle: nothing is written,
  // out is 0. counters are zeros before their first call. kept_pages [B, Hs, K or more] hold the lists in the place of
  // pages, which then has none. A sequence selects where its kept_steps [B] is a multiple of reselect_every; else it
  // reads its list of the step before.
  m.def(
      "decode_step(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) k_bounds, "
      "Tensor page_table, Tensor start_lens, Tensor seq_lens, SymInt num_pages, int group_reduce=1, int sink_pages=0, "
      "int recent_pages=1, float? scale=None, Tensor(d!)? k_scales=None, Tensor? new_lens=None, Tensor? budgets=None, "
      "float? std_factor=None, Tensor(e!)? counters=None, Tensor(f!)? kept_pages=None, Tensor? kept_steps=None, "
      "int reselect_every=1, int dense_below=0) -> (Tensor out, Tensor lse, Tensor pages)");
}
