// q- . lower + q+ . upper for every page. A task scores some pages of a sequence for all heads, as the bounds of a page
// are adjacent in memory.
#include <torch/csrc/stable/library.h>

#include <limits>
#include <memory>

#include "../checks.h"
#include "../namespace.h"
#include "checked_copies.h"
#include "elements.h"
#include "simd/loops.h"

namespace quest::cpu {

static constexpr int kTaskPages = 64;
static constexpr int kQueries = 16;  // at a time

struct EstimateKernelParams {
  EstimateParams op;
  const Loops& loops;
  const float* queries;  // [B, Hkv, T, 2, G, D]: their negative and positive parts
};

static std::unique_ptr<float[]> signed_parts(const EstimateParams& p) {
  const auto [B, T, Hq, Hkv, D] = p.size;
  auto parts = std::make_unique_for_overwrite<float[]>(int64_t{B} * T * Hq * 2 * D);
  float* negative = parts.get();
  const int group = p.size.group();
  const int64_t half = int64_t{group} * D;
  for (int b = 0; b < B; ++b)
    for (int h = 0; h < Hkv; ++h)
      for (int t = 0; t < T; ++t, negative += 2 * half)
        for (int g = 0; g < group; ++g) {
          const int64_t offset = b * p.q.stride_b + t * p.q.stride_t + (h * group + g) * p.q.stride_h;
          float *lower = negative + int64_t{g} * D, *upper = lower + half;
          loops().load[dtype_index(p.dtype)](element(p.q.data, offset, p.dtype), D, lower);
          for (int d = 0; d < D; ++d) {
            const float x = lower[d];
            lower[d] = x > 0 ? 0 : x;  // NaN stays in both
            upper[d] = x < 0 ? 0 : x;
          }
        }
  return parts;
}

// A row of 4-bit bounds as int8.
static void unpack(const std::byte* row, int D, int8_t* to) {
  for (int d = 0; d < D; d += 2) {
    const int bits = std::to_integer<int>(row[d / 2]);
    to[d] = static_cast<int8_t>((bits & 15) - 8), to[d + 1] = static_cast<int8_t>((bits >> 4) - 8);
  }
}

static void estimate_pages(const EstimateKernelParams& kernel, int b, int first) {
  const EstimateParams& p = kernel.op;
  const auto [B, T, Hq, Hkv, D] = p.size;
  const Bounds& bounds = p.k_bounds;
  const auto dots = kernel.loops.dots[bounds.scales ? kInt8 : dtype_index(p.dtype)];
  const int64_t size = bounds.scales ? 1 : element_size(p.dtype);
  const int group = p.size.group();
  const int64_t half = int64_t{group} * D;
  const int width = std::min(kTaskPages, p.paging.P - first);
  const int pages = std::clamp(p.paging.pages_of(p.paging.length(b)) - first, 0, width);
  const void *lower[kTaskPages], *upper[kTaskPages];
  float scale[kTaskPages];
  int8_t unpacked[kTaskPages][2][kMaxHeadDim];
  for (int h = 0; h < Hkv; ++h) {
    for (int i = 0; i < pages; ++i) {
      const int64_t page = p.paging.physical(b, first + i);
      const std::byte* const row =
          static_cast<const std::byte*>(bounds.data) + (page * bounds.stride_n + h * bounds.stride_h) * size;
      lower[i] = row, upper[i] = row + bounds.stride_c * size;
      if (bounds.packed) {
        unpack(row, D, unpacked[i][0]), unpack(row + bounds.stride_c, D, unpacked[i][1]);
        lower[i] = unpacked[i][0], upper[i] = unpacked[i][1];
      }
      scale[i] = bounds.scales ? bounds.scales[page * bounds.scales_stride_n + h * bounds.scales_stride_h] : 1.f;
    }
    for (int t = 0; t < T; ++t) {
      const float* const negative = kernel.queries + ((int64_t{b} * Hkv + h) * T + t) * 2 * half;
      const int seen = std::clamp(p.paging.pages_of(p.paging.visible(b, t, T)) - first, 0, pages);
      for (int g = 0; g < group; ++g) {
        float* scores = p.scores + ((int64_t{b} * T + t) * Hq + h * group + g) * p.paging.P + first;
        std::fill(scores + seen, scores + width, -std::numeric_limits<float>::infinity());
      }
      for (int g = 0; g < group; g += kQueries) {
        const int queries = std::min(kQueries, group - g);
        float* scores = p.scores + ((int64_t{b} * T + t) * Hq + h * group + g) * p.paging.P + first;
        const float* const q = negative + int64_t{g} * D;
        float uppers[kQueries][kTaskPages];
        dots(q, queries, lower, seen, D, 1.0f, scores, p.paging.P);
        dots(q + half, queries, upper, seen, D, 1.0f, uppers[0], kTaskPages);
        for (int j = 0; j < queries; ++j)
          for (int i = 0; i < seen; ++i) {
            float& score = scores[j * int64_t{p.paging.P} + i];
            score = (score + uppers[j][i]) * scale[i];
          }
      }
    }
  }
}

Tensor estimate(
    Tensor q, Tensor k_bounds, Tensor page_table, Tensor seq_lens, int64_t page_size, std::optional<Tensor> k_scales,
    std::optional<Tensor> new_lens) {
  EstimateParams p = check_estimate(q, k_bounds, page_table, seq_lens, page_size, k_scales, new_lens);
  const CheckedCopies copies(p);
  const auto [B, T, Hq, Hkv, D] = p.size;
  const int64_t P = p.paging.P;
  Tensor scores = q.dim() == 4 ? torch::stable::new_empty(q, {B, T, Hq, P}, ScalarType::Float)
                               : torch::stable::new_empty(q, {B, Hq, P}, ScalarType::Float);
  if (P == 0) return scores;  // any number of queries
  p.scores = static_cast<float*>(scores.mutable_data_ptr());
  const auto queries = signed_parts(p);
  const EstimateKernelParams kernel{.op = p, .loops = loops(), .queries = queries.get()};
  const int64_t tasks = (P + kTaskPages - 1) / kTaskPages;
  const int64_t bytes = int64_t{kTaskPages} * Hkv * 2 * D * element_size(p.dtype);
  torch::stable::parallel_for(0, B * tasks, grain(bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      estimate_pages(kernel, static_cast<int>(i / tasks), static_cast<int>(i % tasks) * kTaskPages);
  });
  return scores;
}

QUEST_LIBRARY_IMPL(CPU, m) { m.impl("estimate", TORCH_BOX(&estimate)); }

}  // namespace quest::cpu
