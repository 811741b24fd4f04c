// q+ . upper + q- . lower is one dot product of twice the length: [q-, q+] with a page's [lower, upper] as one row. A
// task takes a few pages of a sequence and all heads, as a page's bounds lie together.
#include <limits>
#include <memory>

#include "../checks.h"
#include "../namespace.h"
#include "elements.h"
#include "simd/loops.h"

#include <torch/csrc/stable/library.h>

namespace quest::cpu {

static constexpr int kTaskPages = 8;

// [B, Hkv, T, G, 2 * D]: the negative and the positive part of each query.
static std::unique_ptr<float[]> split_queries(const EstimateParams& p) {
  const auto [B, T, Hq, Hkv, D] = p.size;
  auto split = std::make_unique_for_overwrite<float[]>(int64_t{B} * T * Hq * 2 * D);
  float* row = split.get();
  for (int b = 0; b < B; ++b)
    for (int h = 0; h < Hkv; ++h)
      for (int t = 0; t < T; ++t)
        for (int g = 0; g < p.size.group(); ++g, row += 2 * D) {
          const int64_t offset = b * p.q.stride_b + t * p.q.stride_t + (h * p.size.group() + g) * p.q.stride_h;
          loops().load[dtype_index(p.dtype)](element(p.q.data, offset, p.dtype), 0, 1, D, row);
          for (int d = 0; d < D; ++d) {
            const float x = row[d];
            row[d] = x > 0 ? 0 : x;  // NaN stays in both
            row[D + d] = x < 0 ? 0 : x;
          }
        }
  return split;
}

static void estimate_pages(const EstimateParams& p, const float* queries, int b, int first) {
  const auto [B, T, Hq, Hkv, D] = p.size;
  const Loops& loop = loops();
  const int group = p.size.group(), width = std::min(kTaskPages, p.paging.P - first);
  const int pages = std::clamp(p.paging.pages_of(p.paging.length(b)) - first, 0, width);
  float bounds[kTaskPages][2 * kMaxHeadDim];
  for (int h = 0; h < Hkv; ++h) {
    for (int i = 0; i < pages; ++i) {
      const int64_t page = p.paging.physical(b, first + i);
      const int64_t offset = page * p.k_bounds.stride_n + h * p.k_bounds.stride_h;
      loop.load[dtype_index(p.dtype)](
          element(p.k_bounds.data, offset, p.dtype), p.k_bounds.stride_c, 2, D, bounds[i]);
    }
    for (int t = 0; t < T; ++t) {
      const float* q = queries + ((int64_t{b} * Hkv + h) * T + t) * group * 2 * D;
      float* scores = p.scores + ((int64_t{b} * T + t) * Hq + h * group) * p.paging.P + first;
      const int seen = std::clamp(p.paging.pages_of(p.paging.visible(b, t, T)) - first, 0, pages);
      loop.dots(q, group, bounds[0], 2 * kMaxHeadDim, seen, 2 * D, 1.0f, scores, p.paging.P);
      for (int g = 0; g < group; ++g)
        std::fill_n(
            scores + int64_t{g} * p.paging.P + seen, width - seen, -std::numeric_limits<float>::infinity());
    }
  }
}

Tensor estimate(Tensor q, Tensor k_bounds, Tensor page_table, Tensor seq_lens, int64_t page_size) {
  EstimateParams p = check_estimate(q, k_bounds, page_table, seq_lens, page_size);
  check_values(p);
  const auto [B, T, Hq, Hkv, D] = p.size;
  const int64_t P = p.paging.P;
  Tensor scores = q.dim() == 4 ? torch::stable::new_empty(q, {B, T, Hq, P}, ScalarType::Float)
                               : torch::stable::new_empty(q, {B, Hq, P}, ScalarType::Float);
  p.scores = static_cast<float*>(scores.mutable_data_ptr());
  const auto queries = split_queries(p);
  const int64_t tasks = (P + kTaskPages - 1) / kTaskPages;
  const int64_t bytes = int64_t{kTaskPages} * Hkv * 2 * D * element_size(p.dtype);
  torch::stable::parallel_for(0, B * tasks, grain(bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      estimate_pages(p, queries.get(), static_cast<int>(i / tasks), static_cast<int>(i % tasks) * kTaskPages);
  });
  return scores;
}

QUEST_LIBRARY_IMPL(CPU, m) { m.impl("estimate", TORCH_BOX(&estimate)); }

}  // namespace quest::cpu
