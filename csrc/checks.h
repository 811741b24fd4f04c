// An operator's tensors -> its params. Shapes, dtypes, devices and strides are checked here and in check_tensors.h, for
// CPU and CUDA alike, and nowhere else: a kernel trusts its params.
#pragma once

#include <algorithm>
#include <cmath>

#include "check_tensors.h"
#include "check_values.h"

namespace quest {

// After check_leading and check_groups, which hold the sizes to int32.
inline Sizes sizes_of(const Leading& q, int64_t Hkv, int32_t D) {
  return {
      .B = static_cast<int32_t>(q.B),
      .T = static_cast<int32_t>(q.T),
      .Hq = static_cast<int32_t>(q.H),
      .Hkv = static_cast<int32_t>(Hkv),
      .D = D};
}

inline Query query_of(const Tensor& q, const Leading& leading) {
  return {
      .data = q.const_data_ptr(),
      .stride_b = leading.stride_b,
      .stride_t = leading.stride_t,
      .stride_h = leading.stride_h,
      .aligned = is_aligned(q)};
}

inline AppendParams check_append_kv(
    const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache, const Tensor& k_bounds,
    const Tensor& page_table, const Tensor& seq_lens, const std::optional<Tensor>& new_lens,
    const std::optional<Tensor>& k_scales, std::optional<double> std_factor, const char* lens_name = "seq_lens",
    const std::optional<Tensor>& end_lens = std::nullopt) {
  AppendParams p{};
  p.dtype = check_dtype(k, "k");
  check_dim(k, "k", 4, "[B, T, Hkv, D]");
  const int64_t B = k.size(0), T = k.size(1), Hkv = k.size(2);
  const int32_t D = check_head_dim(k, "k");
  p.k = check_new_tokens(k, "k", k, "k");
  p.v = check_new_tokens(v, "v", k, "k");
  p.k_cache = check_cache(k_cache, "k_cache", k, "k", Hkv, D, true);
  p.v_cache = check_cache(v_cache, "v_cache", k, "k", Hkv, D, true);
  p.k_bounds = check_bounds(k_bounds, k_scales, k, "k", Hkv, D, true, std_factor);
  check_same_pages(v_cache, "v_cache", k_cache, "k_cache");
  check_same_pages(k_bounds, "k_bounds", k_cache, "k_cache");
  check_size(v_cache, "v_cache", 2, k_cache.size(2), "[N, Hkv, S, D]", "the page size of k_cache");
  const int32_t shift = check_page_size(k_cache.size(2), "k_cache's page size (dimension 2)");
  p.paging = check_paging(page_table, seq_lens, B, k_cache.size(0), shift, k, "k", lens_name);
  p.paging.new_lens = check_optional_lens(new_lens, "new_lens", B, k, "k");
  p.end_lens = check_optional_lens(end_lens, "seq_lens", B, k, "k");
  if (B > 0) {
    check_own_memory(k_cache, "k_cache");
    check_own_memory(v_cache, "v_cache");
    check_own_memory(k_bounds, "k_bounds");
    if (k_scales) check_own_memory(*k_scales, "k_scales");
    STD_TORCH_CHECK(
        v_cache.numel() == 0 || p.v_cache.data != p.k_cache.data,
        "v_cache must have memory of its own, since it is written to, got that of k_cache");
  }
  const int32_t heads = check_int32_range(Hkv, "the number of KV heads");
  p.size = {.B = check_int32_range(B, "B"), .T = check_int32_range(T, "T"), .Hq = heads, .Hkv = heads, .D = D};
  // The first of them may be the last token of its page.
  p.max_touched = T == 0 ? 0 : static_cast<int32_t>((T - 2 + 2 * (int64_t{1} << shift)) >> shift);
  return p;
}

inline UpdateBoundsParams check_update_bounds(
    const Tensor& k_cache, const Tensor& k_bounds, const Tensor& page_table, const Tensor& seq_lens,
    const std::optional<Tensor>& first_token, const std::optional<Tensor>& k_scales, std::optional<double> std_factor) {
  UpdateBoundsParams p{};
  p.dtype = check_dtype(k_cache, "k_cache");
  check_dim(k_cache, "k_cache", 4, "[N, Hkv, S, D]");
  const int64_t Hkv = k_cache.size(1);
  const int32_t D = check_head_dim(k_cache, "k_cache");
  p.k_cache = check_cache(k_cache, "k_cache", k_cache, "k_cache", Hkv, D);
  p.k_bounds = check_bounds(k_bounds, k_scales, k_cache, "k_cache", Hkv, D, true, std_factor);
  check_same_pages(k_bounds, "k_bounds", k_cache, "k_cache");
  const int32_t shift = check_page_size(k_cache.size(2), "k_cache's page size (dimension 2)");
  check_dim(page_table, "page_table", 2, "[B, P]");
  const int64_t B = page_table.size(0);
  p.paging = check_paging(page_table, seq_lens, B, k_cache.size(0), shift, k_cache, "k_cache");
  p.first_token = check_optional_lens(first_token, "first_token", B, k_cache, "k_cache");
  if (B > 0) {
    check_own_memory(k_bounds, "k_bounds");
    if (k_scales) check_own_memory(*k_scales, "k_scales");
  }
  const int32_t heads = check_int32_range(Hkv, "the number of KV heads");
  p.size = {.B = check_int32_range(B, "B"), .T = 1, .Hq = heads, .Hkv = heads, .D = D};
  return p;
}

inline EstimateParams check_estimate(
    const Tensor& q, const Tensor& k_bounds, const Tensor& page_table, const Tensor& seq_lens, int64_t page_size,
    const std::optional<Tensor>& k_scales, const std::optional<Tensor>& new_lens) {
  EstimateParams p{};
  p.dtype = check_dtype(q, "q");
  const Leading l = check_leading(q, "q", "[B, Hq, D] or [B, T, Hq, D]");
  check_last_stride(q, "q");
  const int32_t D = check_head_dim(q, "q");
  check_dim(k_bounds, "k_bounds", 4, "[N, Hkv, 2, D]");
  const int64_t Hkv = k_bounds.size(1);
  check_groups(l.H, Hkv, "q's heads", "k_bounds' heads");
  p.k_bounds = check_bounds(k_bounds, k_scales, q, "q", Hkv, D);
  const int32_t shift = check_page_size(page_size, "page_size");
  p.paging = check_paging(page_table, seq_lens, l.B, k_bounds.size(0), shift, q, "q");
  p.paging.new_lens = check_optional_lens(new_lens, "new_lens", l.B, q, "q");
  p.size = sizes_of(l, Hkv, D);
  p.q = query_of(q, l);
  return p;
}

inline GroupReduce check_selection(
    int64_t k, const char* name, int64_t group_reduce, int64_t sink_pages, int64_t recent_pages) {
  STD_TORCH_CHECK(
      group_reduce >= 0 && group_reduce <= static_cast<int64_t>(GroupReduce::soft),
      "group_reduce must be 0 (none), 1 (max), 2 (sum) or 3 (soft), got ", group_reduce);
  check_int32_range(k, name);
  STD_TORCH_CHECK(k >= 1, name, " must be at least 1, got ", k);
  STD_TORCH_CHECK(sink_pages >= 0, "sink_pages must be at least 0, got ", sink_pages);
  STD_TORCH_CHECK(recent_pages >= 0, "recent_pages must be at least 0, got ", recent_pages);
  STD_TORCH_CHECK(
      sink_pages <= k && recent_pages <= k - sink_pages, name,
      " must hold the forced pages: sink_pages + recent_pages is ", sink_pages, " + ", recent_pages, ", got ", name,
      " = ", k);
  return static_cast<GroupReduce>(group_reduce);
}

// The pages of a sequence of dense_below tokens, which a list must hold.
inline int32_t check_dense_below(int64_t dense_below, int32_t page_shift) {
  const int64_t tokens = check_int32_range(dense_below, "dense_below"), page_size = int64_t{1} << page_shift;
  return check_pages((tokens + page_size - 1) >> page_shift, page_shift, "dense_below in whole pages");
}

inline TopkParams check_topk_pages(
    const Tensor& scores, const Tensor& seq_lens, int64_t page_size, int64_t k, int64_t num_kv_heads,
    int64_t group_reduce, int64_t sink_pages, int64_t recent_pages, double scale, const std::optional<Tensor>& new_lens,
    const std::optional<Tensor>& budgets, int64_t dense_below) {
  check_given(scores, "scores");
  STD_TORCH_CHECK(
      scores.scalar_type() == ScalarType::Float, "scores must be float32, got ",
      torch::headeronly::toString(scores.scalar_type()));
  const Leading l = check_leading(scores, "scores", "[B, Hq, P] or [B, T, Hq, P]");
  check_last_stride(scores, "scores");
  check_groups(l.H, num_kv_heads, "scores' heads", "num_kv_heads");
  const GroupReduce reduce = check_selection(k, "k", group_reduce, sink_pages, recent_pages);
  const int32_t shift = check_page_size(page_size, "page_size");
  check_int32(seq_lens, "seq_lens", scores, "scores");
  check_dim(seq_lens, "seq_lens", 1, "[B]");
  check_size(seq_lens, "seq_lens", 0, l.B, "[B]", "one length a sequence");
  const int32_t P = check_pages(scores.size(scores.dim() - 1), shift, "scores' tokens a sequence (P * page_size)");
  const Sizes size = sizes_of(l, num_kv_heads, 0);
  return {
      .size = size,
      .paging =
          {.page_table = nullptr,
           .page_table_stride = 0,
           .seq_lens = static_cast<const int32_t*>(seq_lens.const_data_ptr()),
           .P = P,
           .N = 0,
           .page_shift = shift,
           .new_lens = check_optional_lens(new_lens, "new_lens", l.B, scores, "scores")},
      .scores = static_cast<const float*>(scores.const_data_ptr()),
      .stride_b = l.stride_b,
      .stride_t = l.stride_t,
      .stride_h = l.stride_h,
      .Hs = reduce == GroupReduce::none ? size.Hq : size.Hkv,
      .K = std::max(static_cast<int32_t>(k), check_dense_below(dense_below, shift)),
      .sink_pages = static_cast<int32_t>(sink_pages),
      .recent_pages = static_cast<int32_t>(recent_pages),
      .num_pages = static_cast<int32_t>(k),
      .dense_below = static_cast<int32_t>(dense_below),
      .reduce = reduce,
      .scale = check_scale(scale),
      .budgets = check_optional_lens(budgets, "budgets", l.B, scores, "scores"),
      .pages = nullptr};
}

// After check_int32_range has held P to int32.
inline PageLists check_lists(
    const Tensor& pages, const Tensor& q, const Leading& l, int64_t Hkv, const Paging& paging) {
  check_int32(pages, "pages", q, "q");
  const char* shape = q.dim() == 4 ? "[B, T, Hs, K] like q's [B, T, Hq, D]" : "[B, Hs, K] like q's [B, Hq, D]";
  check_dim(pages, "pages", q.dim(), shape);
  const Leading s = check_leading(pages, "pages", shape);
  STD_TORCH_CHECK(
      s.B == l.B && s.T == l.T && (s.H == Hkv || s.H == l.H), "pages must have shape ", shape, " with Hs ", Hkv,
      " (a list a KV head) or ", l.H, " (a list a query head), got ", shape_string(pages), " for q ", shape_string(q));
  PageLists lists{
      .data = static_cast<const int32_t*>(pages.const_data_ptr()),
      .stride_b = s.stride_b,
      .stride_t = s.stride_t,
      .stride_h = s.stride_h,
      .Hs = static_cast<int32_t>(s.H),
      .K = check_pages(pages.size(pages.dim() - 1), paging.page_shift, "pages' tokens a list (K * page_size)")};
  // Null would mean every page, and an empty tensor's address is null. Nothing is read from this one.
  if (lists.K == 0) lists.data = paging.seq_lens;
  return lists;
}

inline AppendCodesParams check_append_codes(
    const Tensor& k, const Tensor& k_codes, const Tensor& code_scales, const Tensor& page_table, const Tensor& seq_lens,
    const std::optional<Tensor>& new_lens) {
  AppendCodesParams p{};
  p.dtype = check_dtype(k, "k");
  check_dim(k, "k", 4, "[B, T, Hkv, D]");
  const int64_t B = k.size(0), T = k.size(1), Hkv = k.size(2);
  const int32_t D = check_head_dim(k, "k");
  p.k = check_new_tokens(k, "k", k, "k");
  p.codes = check_codes(k_codes, code_scales, k, "k", Hkv, D, true);
  const int32_t shift = check_page_size(k_codes.size(2), "k_codes' page size (dimension 2)");
  p.paging = check_paging(page_table, seq_lens, B, k_codes.size(0), shift, k, "k");
  p.paging.new_lens = check_optional_lens(new_lens, "new_lens", B, k, "k");
  if (B > 0) {
    check_own_memory(k_codes, "k_codes");
    check_own_memory(code_scales, "code_scales");
  }
  const int32_t heads = check_int32_range(Hkv, "the number of KV heads");
  p.size = {.B = check_int32_range(B, "B"), .T = check_int32_range(T, "T"), .Hq = heads, .Hkv = heads, .D = D};
  return p;
}

inline RerankParams check_rerank_pages(
    const Tensor& q, const Tensor& k_codes, const Tensor& code_scales, const Tensor& page_table, const Tensor& seq_lens,
    const Tensor& pages, int64_t token_reduce, double scale, const std::optional<Tensor>& new_lens) {
  RerankParams p{};
  p.dtype = check_dtype(q, "q");
  const Leading l = check_leading(q, "q", "[B, Hq, D] or [B, T, Hq, D]");
  check_last_stride(q, "q");
  const int32_t D = check_head_dim(q, "q");
  check_dim(k_codes, "k_codes", 4, "[N, Hkv, S, D / 4]");
  const int64_t Hkv = k_codes.size(1);
  check_groups(l.H, Hkv, "q's heads", "k_codes' heads");
  p.codes = check_codes(k_codes, code_scales, q, "q", Hkv, D);
  const int32_t shift = check_page_size(k_codes.size(2), "k_codes' page size (dimension 2)");
  p.paging = check_paging(page_table, seq_lens, l.B, k_codes.size(0), shift, q, "q");
  p.paging.new_lens = check_optional_lens(new_lens, "new_lens", l.B, q, "q");
  p.size = sizes_of(l, Hkv, D);
  p.q = query_of(q, l);
  p.pages = check_lists(pages, q, l, Hkv, p.paging);
  STD_TORCH_CHECK(
      token_reduce >= 0 && token_reduce <= static_cast<int64_t>(TokenReduce::lse),
      "token_reduce must be 0 (max) or 1 (lse), got ", token_reduce);
  p.reduce = static_cast<TokenReduce>(token_reduce);
  p.scale = check_scale(scale);
  STD_TORCH_CHECK(p.scale > 0, "scale must be above 0, got ", scale);
  return p;
}

inline DecodeParams check_sparse_decode(
    const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& page_table, const Tensor& seq_lens,
    const std::optional<Tensor>& pages, std::optional<double> scale, const std::optional<Tensor>& new_lens) {
  DecodeParams p{};
  p.dtype = check_dtype(q, "q");
  const Leading l = check_leading(q, "q", "[B, Hq, D] or [B, T, Hq, D]");
  check_last_stride(q, "q");
  const int32_t D = check_head_dim(q, "q");
  check_dim(k_cache, "k_cache", 4, "[N, Hkv, S, D]");
  const int64_t Hkv = k_cache.size(1);
  check_groups(l.H, Hkv, "q's heads", "k_cache's heads");
  p.k_cache = check_cache(k_cache, "k_cache", q, "q", Hkv, D);
  p.v_cache = check_cache(v_cache, "v_cache", q, "q", Hkv, D);
  check_same_pages(v_cache, "v_cache", k_cache, "k_cache");
  check_size(v_cache, "v_cache", 2, k_cache.size(2), "[N, Hkv, S, D]", "the page size of k_cache");
  const int32_t shift = check_page_size(k_cache.size(2), "k_cache's page size (dimension 2)");
  p.paging = check_paging(page_table, seq_lens, l.B, k_cache.size(0), shift, q, "q");
  p.paging.new_lens = check_optional_lens(new_lens, "new_lens", l.B, q, "q");
  p.size = sizes_of(l, Hkv, D);
  p.q = query_of(q, l);
  p.pages.Hs = p.size.Hkv, p.pages.K = p.paging.P;
  if (pages) p.pages = check_lists(*pages, q, l, Hkv, p.paging);
  p.scale = scale ? check_scale(*scale) : 1.0f / std::sqrt(static_cast<float>(D));
  return p;
}

inline DecodeStepParams check_decode_step(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
    const Tensor& k_bounds, const Tensor& page_table, const Tensor& start_lens, const Tensor& seq_lens,
    int64_t num_pages, int64_t group_reduce, int64_t sink_pages, int64_t recent_pages, std::optional<double> scale,
    const std::optional<Tensor>& k_scales, const std::optional<Tensor>& new_lens, const std::optional<Tensor>& budgets,
    std::optional<double> std_factor, const std::optional<Tensor>& counters, const std::optional<Tensor>& kept_pages,
    const std::optional<Tensor>& kept_steps, int64_t reselect_every, int64_t dense_below) {
  const DecodeParams d = check_sparse_decode(q, k_cache, v_cache, page_table, seq_lens, std::nullopt, scale, new_lens);
  check_like(k, "k", q, "q");
  check_dim(k, "k", 4, "[B, T, Hkv, D]");
  check_size(k, "k", 0, d.size.B, "[B, T, Hkv, D]", "the number of sequences");
  check_size(k, "k", 1, d.size.T, "[B, T, Hkv, D]", "the new tokens of q");
  const AppendParams append = check_append_kv(
      k, v, k_cache, v_cache, k_bounds, page_table, start_lens, new_lens, k_scales, std_factor, "start_lens", seq_lens);
  const bool dense = num_pages == 0;
  const GroupReduce reduce =
      check_selection(dense ? kMaxCount : num_pages, "num_pages", group_reduce, sink_pages, recent_pages);
  const int32_t Hs = reduce == GroupReduce::none ? d.size.Hq : d.size.Hkv;
  const int32_t K = std::max(
      check_pages(num_pages, d.paging.page_shift, "num_pages' tokens a list (num_pages * page_size)"),
      check_dense_below(dense_below, d.paging.page_shift));
  STD_TORCH_CHECK(!dense || !budgets, "budgets must be left out with a num_pages of 0, which reads every page");
  STD_TORCH_CHECK(!dense || !kept_pages, "kept_pages must be left out with a num_pages of 0, which reads every page");
  return {
      .append = append,
      .size = d.size,
      .paging = d.paging,
      .q = d.q,
      .dense = dense,
      .Hs = Hs,
      .K = dense ? d.paging.P : K,
      .sink_pages = static_cast<int32_t>(sink_pages),
      .recent_pages = static_cast<int32_t>(recent_pages),
      .num_pages = dense ? d.paging.P : static_cast<int32_t>(num_pages),
      .dense_below = static_cast<int32_t>(dense_below),
      .reduce = reduce,
      .scale = d.scale,
      .budgets = check_optional_lens(budgets, "budgets", d.size.B, q, "q"),
      .counters = check_counters(counters, d.size.B, d.size.Hkv, q),
      .num_counters = counters ? counters->size(0) : 0,
      .kept = check_kept_pages(
          kept_pages, kept_steps, reselect_every, q, d.size, Hs, K, static_cast<int32_t>(recent_pages))};
}

}  // namespace quest
