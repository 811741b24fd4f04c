// Tensors -> params. Every requirement on shapes, dtypes, devices, strides and values is here and in check_tensors.h,
// shared by the CPU and the CUDA kernels; a kernel that gets its params may trust them.
#pragma once

#include <cmath>
#include <cstdlib>

#include "check_tensors.h"

namespace quest {

inline AppendParams check_append_kv(
    const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache, const Tensor& k_bounds,
    const Tensor& page_table, const Tensor& seq_lens, const std::optional<Tensor>& new_lens,
    const std::optional<Tensor>& k_scales, const char* lens_name = "seq_lens") {
  AppendParams p{};
  p.dtype = check_dtype(k, "k");
  check_dim(k, "k", 4, "[B, T, Hkv, D]");
  const int64_t B = k.size(0), T = k.size(1), Hkv = k.size(2);
  const int32_t D = check_head_dim(k, "k");
  p.k = check_new_tokens(k, "k", k, "k");
  p.v = check_new_tokens(v, "v", k, "k");
  p.k_cache = check_cache(k_cache, "k_cache", k, "k", Hkv, D);
  p.v_cache = check_cache(v_cache, "v_cache", k, "k", Hkv, D);
  p.k_bounds = check_bounds(k_bounds, k_scales, k, "k", Hkv, D);
  check_same_pages(v_cache, "v_cache", k_cache, "k_cache");
  check_same_pages(k_bounds, "k_bounds", k_cache, "k_cache");
  check_size(v_cache, "v_cache", 2, k_cache.size(2), "[N, Hkv, S, D]", "the page size of k_cache");
  const int32_t shift = check_page_size(k_cache.size(2), "k_cache's page size (dimension 2)");
  p.paging = check_paging(page_table, seq_lens, B, k_cache.size(0), shift, k, "k", lens_name);
  p.new_lens = check_optional_lens(new_lens, "new_lens", B, k, "k");
  const int32_t heads = check_int32_range(Hkv, "the number of KV heads");
  p.size = {check_int32_range(B, "B"), check_int32_range(T, "T"), heads, heads, D};
  p.max_touched = T == 0 ? 0 : static_cast<int32_t>((T - 2 + 2 * (int64_t{1} << shift)) >> shift);
  return p;
}

inline UpdateBoundsParams check_update_bounds(
    const Tensor& k_cache, const Tensor& k_bounds, const Tensor& page_table, const Tensor& seq_lens,
    const std::optional<Tensor>& first_token, const std::optional<Tensor>& k_scales) {
  UpdateBoundsParams p{};
  p.dtype = check_dtype(k_cache, "k_cache");
  check_dim(k_cache, "k_cache", 4, "[N, Hkv, S, D]");
  const int64_t Hkv = k_cache.size(1);
  const int32_t D = check_head_dim(k_cache, "k_cache");
  p.k_cache = check_cache(k_cache, "k_cache", k_cache, "k_cache", Hkv, D);
  p.k_bounds = check_bounds(k_bounds, k_scales, k_cache, "k_cache", Hkv, D);
  check_same_pages(k_bounds, "k_bounds", k_cache, "k_cache");
  const int32_t shift = check_page_size(k_cache.size(2), "k_cache's page size (dimension 2)");
  check_dim(page_table, "page_table", 2, "[B, P]");
  const int64_t B = page_table.size(0);
  p.paging = check_paging(page_table, seq_lens, B, k_cache.size(0), shift, k_cache, "k_cache");
  p.first_token = check_optional_lens(first_token, "first_token", B, k_cache, "k_cache");
  const int32_t heads = check_int32_range(Hkv, "the number of KV heads");
  p.size = {check_int32_range(B, "B"), 1, heads, heads, D};
  return p;
}

inline EstimateParams check_estimate(
    const Tensor& q, const Tensor& k_bounds, const Tensor& page_table, const Tensor& seq_lens, int64_t page_size,
    const std::optional<Tensor>& k_scales) {
  EstimateParams p{};
  p.dtype = check_dtype(q, "q");
  const Rows r = check_rows(q, "q", "[B, Hq, D] or [B, T, Hq, D]");
  check_last_stride(q, "q");
  const int32_t D = check_head_dim(q, "q");
  check_dim(k_bounds, "k_bounds", 4, "[N, Hkv, 2, D]");
  const int64_t Hkv = k_bounds.size(1);
  check_groups(r.H, Hkv, "q's heads", "k_bounds' heads");
  p.k_bounds = check_bounds(k_bounds, k_scales, q, "q", Hkv, D);
  const int32_t shift = check_page_size(page_size, "page_size");
  p.paging = check_paging(page_table, seq_lens, r.B, k_bounds.size(0), shift, q, "q");
  p.size = {
      static_cast<int32_t>(r.B), static_cast<int32_t>(r.T), static_cast<int32_t>(r.H), static_cast<int32_t>(Hkv), D};
  p.q = {q.const_data_ptr(), r.stride_b, r.stride_t, r.stride_h, is_aligned(q)};
  return p;
}

inline void check_selection(
    int64_t k, const char* name, int64_t group_reduce, int64_t sink_pages, int64_t recent_pages) {
  STD_TORCH_CHECK(
      group_reduce >= 0 && group_reduce <= 3, "group_reduce must be 0 (none), 1 (max), 2 (sum) or 3 (soft), got ",
      group_reduce);
  check_int32_range(k, name);
  STD_TORCH_CHECK(k >= 1, name, " must be at least 1, got ", k);
  STD_TORCH_CHECK(sink_pages >= 0, "sink_pages must be at least 0, got ", sink_pages);
  STD_TORCH_CHECK(recent_pages >= 0, "recent_pages must be at least 0, got ", recent_pages);
  STD_TORCH_CHECK(
      sink_pages <= k && recent_pages <= k - sink_pages, name,
      " must hold the forced pages: sink_pages + recent_pages is ", sink_pages, " + ", recent_pages, ", got ", name,
      " = ", k);
}

inline TopkParams check_topk_pages(
    const Tensor& scores, const Tensor& seq_lens, int64_t page_size, int64_t k, int64_t num_kv_heads,
    int64_t group_reduce, int64_t sink_pages, int64_t recent_pages, double scale) {
  TopkParams p{};
  STD_TORCH_CHECK(
      scores.scalar_type() == ScalarType::Float, "scores must be float32, got ",
      torch::headeronly::toString(scores.scalar_type()));
  const Rows r = check_rows(scores, "scores", "[B, Hq, P] or [B, T, Hq, P]");
  check_last_stride(scores, "scores");
  check_groups(r.H, num_kv_heads, "scores' heads", "num_kv_heads");
  check_selection(k, "k", group_reduce, sink_pages, recent_pages);
  const int32_t shift = check_page_size(page_size, "page_size");
  check_int32(seq_lens, "seq_lens", scores, "scores");
  check_dim(seq_lens, "seq_lens", 1, "[B]");
  check_size(seq_lens, "seq_lens", 0, r.B, "[B]", "one length a sequence");
  const int32_t P = check_pages(scores.size(scores.dim() - 1), shift, "scores' tokens a sequence (P * page_size)");
  p.size = {
      static_cast<int32_t>(r.B), static_cast<int32_t>(r.T), static_cast<int32_t>(r.H),
      static_cast<int32_t>(num_kv_heads), 0};
  p.paging = {nullptr, 0, static_cast<const int32_t*>(seq_lens.const_data_ptr()), P, 0, shift};
  p.scores = static_cast<const float*>(scores.const_data_ptr());
  p.stride_b = r.stride_b, p.stride_t = r.stride_t, p.stride_h = r.stride_h;
  p.reduce = static_cast<GroupReduce>(group_reduce);
  p.Hs = p.reduce == GroupReduce::none ? p.size.Hq : p.size.Hkv;
  p.K = static_cast<int32_t>(k);
  p.sink_pages = static_cast<int32_t>(sink_pages), p.recent_pages = static_cast<int32_t>(recent_pages);
  p.scale = static_cast<float>(scale);
  return p;
}

inline DecodeParams check_sparse_decode(
    const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& page_table, const Tensor& seq_lens,
    const std::optional<Tensor>& pages, std::optional<double> scale) {
  DecodeParams p{};
  p.dtype = check_dtype(q, "q");
  const Rows r = check_rows(q, "q", "[B, Hq, D] or [B, T, Hq, D]");
  check_last_stride(q, "q");
  const int32_t D = check_head_dim(q, "q");
  check_dim(k_cache, "k_cache", 4, "[N, Hkv, S, D]");
  const int64_t Hkv = k_cache.size(1);
  check_groups(r.H, Hkv, "q's heads", "k_cache's heads");
  p.k_cache = check_cache(k_cache, "k_cache", q, "q", Hkv, D);
  p.v_cache = check_cache(v_cache, "v_cache", q, "q", Hkv, D);
  check_same_pages(v_cache, "v_cache", k_cache, "k_cache");
  check_size(v_cache, "v_cache", 2, k_cache.size(2), "[N, Hkv, S, D]", "the page size of k_cache");
  const int32_t shift = check_page_size(k_cache.size(2), "k_cache's page size (dimension 2)");
  p.paging = check_paging(page_table, seq_lens, r.B, k_cache.size(0), shift, q, "q");
  p.size = {
      static_cast<int32_t>(r.B), static_cast<int32_t>(r.T), static_cast<int32_t>(r.H), static_cast<int32_t>(Hkv), D};
  p.q = {q.const_data_ptr(), r.stride_b, r.stride_t, r.stride_h, is_aligned(q)};
  p.Hs = p.size.Hkv, p.K = p.paging.P;
  if (pages) {
    check_int32(*pages, "pages", q, "q");
    const char* shape = q.dim() == 4 ? "[B, T, Hs, K] like q's [B, T, Hq, D]" : "[B, Hs, K] like q's [B, Hq, D]";
    check_dim(*pages, "pages", q.dim(), shape);
    const Rows s = check_rows(*pages, "pages", shape);
    STD_TORCH_CHECK(
        s.B == r.B && s.T == r.T && (s.H == Hkv || s.H == r.H), "pages must have shape ", shape, " with Hs ", Hkv,
        " (a list a KV head) or ", r.H, " (a list a query head), got ", shape_string(*pages), " for q ",
        shape_string(q));
    p.pages = static_cast<const int32_t*>(pages->const_data_ptr());
    p.pages_stride_b = s.stride_b, p.pages_stride_t = s.stride_t, p.pages_stride_h = s.stride_h;
    p.Hs = static_cast<int32_t>(s.H);
    p.K = check_pages(pages->size(pages->dim() - 1), shift, "pages' tokens a list (K * page_size)");
    // An empty tensor has no address, but null means every page: any address will do, as nothing is read from it.
    if (p.K == 0) p.pages = p.paging.seq_lens;
  }
  p.scale = scale ? static_cast<float>(*scale) : 1.0f / std::sqrt(static_cast<float>(D));
  return p;
}

inline DecodeStepParams check_decode_step(
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
    const Tensor& k_bounds, const Tensor& page_table, const Tensor& start_lens, const Tensor& seq_lens,
    int64_t num_pages, int64_t group_reduce, int64_t sink_pages, int64_t recent_pages, std::optional<double> scale,
    const std::optional<Tensor>& k_scales) {
  const DecodeParams d = check_sparse_decode(q, k_cache, v_cache, page_table, seq_lens, std::nullopt, scale);
  check_like(k, "k", q, "q");
  check_dim(k, "k", 4, "[B, T, Hkv, D]");
  check_size(k, "k", 0, d.size.B, "[B, T, Hkv, D]", "the number of sequences");
  check_size(k, "k", 1, d.size.T, "[B, T, Hkv, D]", "the new tokens of q");
  DecodeStepParams p{};
  p.append =
      check_append_kv(k, v, k_cache, v_cache, k_bounds, page_table, start_lens, std::nullopt, k_scales, "start_lens");
  check_selection(num_pages, "num_pages", group_reduce, sink_pages, recent_pages);
  check_pages(num_pages, d.paging.page_shift, "num_pages' tokens a list (num_pages * page_size)");
  p.size = d.size, p.paging = d.paging, p.q = d.q, p.scale = d.scale;
  p.reduce = static_cast<GroupReduce>(group_reduce);
  p.Hs = p.reduce == GroupReduce::none ? p.size.Hq : p.size.Hkv;
  p.K = static_cast<int32_t>(num_pages);
  p.sink_pages = static_cast<int32_t>(sink_pages), p.recent_pages = static_cast<int32_t>(recent_pages);
  return p;
}

// Values. On the CPU they are always checked; on the GPU only where QUEST_OPS_CHECK=1 asks for the copy and the sync.

inline bool value_checks_requested() {
  const char* v = std::getenv("QUEST_OPS_CHECK");
  return v && *v && std::string(v) != "0";
}

inline void check_seq_lens(const Paging& g, int32_t B, const char* name = "seq_lens") {
  for (int32_t b = 0; b < B; ++b)
    STD_TORCH_CHECK(
        g.seq_lens[b] >= 0 && g.seq_lens[b] <= g.capacity(), name, " must be 0 to ", g.capacity(),
        " (P * page_size), got ", g.seq_lens[b], " for sequence ", b);
}

// Entries [first, last) of a row must be physical pages; those past a sequence's pages are never read.
inline void check_page_table(const Paging& g, int32_t b, int32_t first, int32_t last) {
  for (int32_t i = first; i < last; ++i) {
    const int32_t page = g.page_table[b * g.page_table_stride + i];
    STD_TORCH_CHECK(
        page >= 0 && page < g.N, "page_table must hold physical pages 0 to ", g.N - 1, ", got ", page, " for sequence ",
        b, ", page ", i);
  }
}

inline void check_values(const AppendParams& p, const char* lens_name = "seq_lens") {
  check_seq_lens(p.paging, p.size.B, lens_name);
  for (int32_t b = 0; b < p.size.B; ++b) {
    const int32_t n = p.new_lens ? p.new_lens[b] : p.size.T, length = p.paging.seq_lens[b];
    STD_TORCH_CHECK(n >= 0 && n <= p.size.T, "new_lens must be 0 to ", p.size.T, " (T), got ", n, " for sequence ", b);
    STD_TORCH_CHECK(
        n <= p.paging.capacity() - length, "page_table must have room for ", lens_name, " + new tokens, ", length,
        " + ", n, " for sequence ", b, ", got ", p.paging.P, " pages of ", p.paging.page_size());
    if (n) check_page_table(p.paging, b, length >> p.paging.page_shift, p.paging.pages_of(length + n));
  }
}

inline void check_values(const DecodeStepParams& p) {
  check_seq_lens(p.paging, p.size.B);
  check_values(p.append, "start_lens");
  for (int32_t b = 0; b < p.size.B; ++b) {
    check_page_table(p.paging, b, 0, p.paging.pages_of(p.paging.seq_lens[b]));
    STD_TORCH_CHECK(
        p.paging.seq_lens[b] == p.append.paging.seq_lens[b] + p.size.T, "seq_lens must be start_lens + T, ",
        p.append.paging.seq_lens[b], " + ", p.size.T, " for sequence ", b, ", got ", p.paging.seq_lens[b]);
  }
}

inline void check_values(const UpdateBoundsParams& p) {
  check_seq_lens(p.paging, p.size.B);
  for (int32_t b = 0; b < p.size.B; ++b) {
    const int32_t first = p.first_token ? p.first_token[b] : 0;
    STD_TORCH_CHECK(first >= 0, "first_token must be at least 0, got ", first, " for sequence ", b);
    check_page_table(p.paging, b, first >> p.paging.page_shift, p.paging.pages_of(p.paging.seq_lens[b]));
  }
}

inline void check_values(const EstimateParams& p) {
  check_seq_lens(p.paging, p.size.B);
  for (int32_t b = 0; b < p.size.B; ++b) check_page_table(p.paging, b, 0, p.paging.pages_of(p.paging.seq_lens[b]));
}

inline void check_values(const TopkParams& p) { check_seq_lens(p.paging, p.size.B); }

inline void check_values(const DecodeParams& p) {
  check_seq_lens(p.paging, p.size.B);
  for (int32_t b = 0; b < p.size.B; ++b) {
    check_page_table(p.paging, b, 0, p.paging.pages_of(p.paging.seq_lens[b]));
    if (!p.pages) continue;
    for (int32_t t = 0; t < p.size.T; ++t)
      for (int32_t h = 0; h < p.Hs; ++h)
        for (int32_t i = 0; i < p.K; ++i) {
          const int32_t page = p.pages[b * p.pages_stride_b + t * p.pages_stride_t + h * p.pages_stride_h + i];
          STD_TORCH_CHECK(
              page >= -1 && page < p.paging.P, "pages must hold logical pages 0 to ", p.paging.P - 1,
              ", or -1 as padding, got ", page, " for sequence ", b, ", head ", h);
        }
  }
}

}  // namespace quest
