// Scores of listed pages from the codes of their tokens. A task scores some pages of a list for the heads that share
// it.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "../checks.h"
#include "../namespace.h"
#include "checked_copies.h"
#include "elements.h"
#include "queries.h"
#include "rotate.h"
#include "simd/loops.h"

namespace quest::cpu {

static constexpr int kTaskPages = 32;
static constexpr int kTaskHeads = 8;  // whose scores of a page are in memory at a time

// The high parts of a query, and then the low ones.
static void rotate_query(const float* q, int D, float* parts) {
  double x[kMaxHeadDim], most = 0;
  std::copy_n(q, D, x);
  rotate(x, D);
  for (int d = 0; d < D; ++d) most = std::max(most, std::fabs(x[d] *= rotation_scale(D)));
  const double unit = rotated_unit(static_cast<float>(most));
  for (int d = 0; d < D; ++d) {
    const RotatedParts both = split_rotated(x[d], unit);
    parts[d] = both.high, parts[D + d] = both.low;
  }
}

// float [B, T, Hq, 2, D]
static Queries rotate_queries(const RerankParams& p, const Loops& loops) {
  const auto [B, T, Hq, Hkv, D] = p.size;
  Queries queries = allocate_queries(int64_t{B} * T * Hq, 2 * D * sizeof(float), "rerank_pages");
  float* to = reinterpret_cast<float*>(queries.get());
  for (int b = 0; b < B; ++b)
    for (int t = 0; t < T; ++t)
      for (int h = 0; h < Hq; ++h, to += 2 * D) {
        float q[kMaxHeadDim];
        const int64_t offset = b * p.q.stride_b + t * p.q.stride_t + h * p.q.stride_h;
        loops.load[dtype_index(p.dtype)](element(p.q.data, offset, p.dtype), D, q);
        rotate_query(q, D, to);
      }
  return queries;
}

// The score of a page from the n scores of its tokens.
static float reduce_tokens(const Loops& loops, float* scores, int n, const RerankParams& p) {
  const float most = loops.max(scores, n);
  if (p.reduce == TokenReduce::max || !(std::fabs(most) < std::numeric_limits<float>::infinity())) return most;
  for (int i = 0; i < n; ++i) scores[i] = (scores[i] - most) * p.scale;
  return most + std::log(loops.exp_sum(scores, n, 0)) / p.scale;
}

static void rerank_page(
    const RerankParams& p, const Loops& loops, const float* queries, int heads, int kv_head, int64_t page, int n,
    float* scores, int64_t stride) {
  const KeyCodes& codes = p.codes;
  const uint8_t* const rows = codes.data + page * codes.stride_n + kv_head * codes.stride_h;
  const float* const scales = codes.scales + page * codes.scales_stride_n + kv_head * codes.scales_stride_h;
  float of_tokens[kTaskHeads * kPageSizes[std::size(kPageSizes) - 1]];
  for (int first = 0; first < heads; first += kTaskHeads) {
    const int count = std::min(kTaskHeads, heads - first);
    loops.score_codes(
        queries + int64_t{first} * 2 * p.size.D, count, rows, codes.stride_s, scales, codes.scales_stride_s, n,
        p.size.D, of_tokens, n);
    for (int h = 0; h < count; ++h) scores[(first + h) * stride] = reduce_tokens(loops, of_tokens + h * n, n, p);
  }
}

Tensor rerank_pages(
    Tensor q, Tensor k_codes, Tensor code_scales, Tensor page_table, Tensor seq_lens, Tensor pages,
    int64_t token_reduce, double scale, std::optional<Tensor> new_lens) {
  RerankParams p =
      check_rerank_pages(q, k_codes, code_scales, page_table, seq_lens, pages, token_reduce, scale, new_lens);
  const CheckedCopies copies(p);
  const auto [B, T, Hq, Hkv, D] = p.size;
  const int32_t P = p.paging.P, Hs = p.pages.Hs, K = p.pages.K, heads = Hq / Hs;
  Tensor scores = q.dim() == 4 ? torch::stable::new_empty(q, {B, T, Hq, P}, ScalarType::Float)
                               : torch::stable::new_empty(q, {B, Hq, P}, ScalarType::Float);
  if (scores.numel() == 0) return scores;
  p.scores = static_cast<float*>(scores.mutable_data_ptr());
  std::fill_n(p.scores, scores.numel(), -std::numeric_limits<float>::infinity());
  const Loops& loops = cpu::loops();
  const Queries rotated = rotate_queries(p, loops);
  const float* const queries = reinterpret_cast<const float*>(rotated.get());
  const int64_t tasks = (int64_t{K} + kTaskPages - 1) / kTaskPages;
  const int64_t bytes = int64_t{kTaskPages} * p.paging.page_size() * D * heads;  // as many as the work takes
  torch::stable::parallel_for(0, int64_t{B} * T * Hs * tasks, grain(bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t list = i / tasks;
      const int h = static_cast<int>(list % Hs), t = static_cast<int>(list / Hs % T);
      const int b = static_cast<int>(list / Hs / T), visible = p.paging.visible(b, t, T);
      const int64_t first_head = (int64_t{b} * T + t) * Hq + h * heads;
      const int32_t* const entries = p.pages.of(b, t, h);
      const int first = static_cast<int>(i % tasks) * kTaskPages;
      for (int entry = first; entry < std::min(K, first + kTaskPages); ++entry) {
        const int32_t logical = entries[entry];
        if (logical < 0) continue;
        const int64_t start = int64_t{logical} << p.paging.page_shift;
        const int n = static_cast<int>(std::clamp<int64_t>(visible - start, 0, p.paging.page_size()));
        if (n == 0) continue;
        rerank_page(
            p, loops, queries + first_head * 2 * D, heads, h * heads / p.size.group(), p.paging.physical(b, logical), n,
            p.scores + first_head * P + logical, P);
      }
    }
  });
  return scores;
}

QUEST_LIBRARY_IMPL(CPU, m) { m.impl("rerank_pages", TORCH_BOX(&rerank_pages)); }

}  // namespace quest::cpu
