// Scores of pages from their bounds. A task scores some pages of a sequence for all heads, as the bounds of a page are
// adjacent in memory.
#include <torch/csrc/stable/library.h>

#include <limits>

#include "../checks.h"
#include "../namespace.h"
#include "checked_copies.h"
#include "elements.h"
#include "queries.h"
#include "simd/loops.h"
#include "steps.h"

namespace quest::cpu {

static constexpr int kTaskPages = 64;
static constexpr int kBlockPages = 8;  // scored at a time, while the next ones are fetched
static_assert(kTaskPages % kBlockPages == 0);

struct EstimateKernelParams {
  EstimateParams op;
  const Loops& loops;
  int32_t first_head, heads;  // of each group: those that are scored
  const std::byte* queries;   // [B, Hkv, T, heads], as the loops read them
  int64_t query_bytes;
};

// Queries in memory at a time, less than 256 MiB. A group of millions of heads is scored in several passes.
static constexpr int64_t kMostQueries = 1 << 17;

static Queries split_queries(const EstimateParams& p, const Loops& loops, int32_t first_head, int32_t heads) {
  const auto [B, T, Hq, Hkv, D] = p.size;
  const int64_t bytes = loops.query_bytes(D);
  const int64_t count = int64_t{B} * T * Hkv * heads;
  Queries queries = allocate_queries(count, bytes, "estimate");
  std::byte* to = queries.get();
  for (int b = 0; b < B; ++b)
    for (int h = 0; h < Hkv; ++h)
      for (int t = 0; t < T; ++t)
        for (int g = first_head; g < first_head + heads; ++g, to += bytes) {
          float q[kMaxHeadDim];
          const int64_t offset = b * p.q.stride_b + t * p.q.stride_t + (h * p.size.group() + g) * p.q.stride_h;
          loops.load[dtype_index(p.dtype)](element(p.q.data, offset, p.dtype), D, q);
          loops.split_query(q, D, to);
        }
  return queries;
}

// The bounds of a block of pages, of one KV head.
struct BoundsBlock {
  const void *lower[kBlockPages], *upper[kBlockPages];
  float scales[kBlockPages];
};

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
  const auto score = kernel.loops.score[bounds.scales ? kInt8 : dtype_index(p.dtype)];
  const int64_t size = bounds.scales ? 1 : element_size(p.dtype);
  const int64_t row_bytes = bounds.packed ? D / 2 : D * size;
  const int group = p.size.group();
  const int width = std::min(kTaskPages, p.paging.P - first);
  const int left = std::max(0, p.paging.pages_of(p.paging.length(b)) - first), pages = std::min(left, width);
  const int known = std::min(left, kTaskPages + kBlockPages);
  const std::byte* rows[kTaskPages + kBlockPages];  // of the first head; the last are prefetched for the next task
  for (int i = 0; i < known; ++i)
    rows[i] = static_cast<const std::byte*>(bounds.data) + p.paging.physical(b, first + i) * bounds.stride_n * size;
  int seen[kMaxNewTokens];
  for (int t = 0; t < T; ++t) {
    seen[t] = std::clamp(p.paging.pages_of(p.paging.visible(b, t, T)) - first, 0, pages);
    for (int h = 0; h < Hkv; ++h)
      for (int g = kernel.first_head; g < kernel.first_head + kernel.heads; ++g) {
        float* const scores = p.scores + ((int64_t{b} * T + t) * Hq + h * group + g) * p.paging.P + first;
        std::fill(scores + seen[t], scores + width, -std::numeric_limits<float>::infinity());
      }
  }
  for (int begin = 0; begin < pages; begin += kBlockPages)
    for (int h = 0; h < Hkv; ++h) {
      const int count = std::min(kBlockPages, pages - begin);
      BoundsBlock block;
      int8_t unpacked[kBlockPages][2][kMaxHeadDim];
      for (int i = 0; i < count; ++i) {
        const std::byte* const row = rows[begin + i] + h * bounds.stride_h * size;
        block.lower[i] = row, block.upper[i] = row + bounds.stride_c * size;
        if (bounds.packed) {
          unpack(row, D, unpacked[i][0]), unpack(row + bounds.stride_c, D, unpacked[i][1]);
          block.lower[i] = unpacked[i][0], block.upper[i] = unpacked[i][1];
        }
        if (!bounds.scales) continue;
        const int64_t page = p.paging.physical(b, first + begin + i);
        block.scales[i] = bounds.scales[page * bounds.scales_stride_n + h * bounds.scales_stride_h];
      }
      for (int i = begin + kBlockPages; i < std::min(begin + 2 * kBlockPages, known); ++i)
        for (const int c : {0, 1})
          for (int64_t byte = 0; byte < row_bytes; byte += 64)
            __builtin_prefetch(rows[i] + (h * bounds.stride_h + c * bounds.stride_c) * size + byte, 0, 2);
      for (int t = 0; t < T; ++t) {
        const int64_t query = ((int64_t{b} * Hkv + h) * T + t) * kernel.heads, head = h * group + kernel.first_head;
        float* const scores = p.scores + ((int64_t{b} * T + t) * Hq + head) * p.paging.P + first + begin;
        score(
            kernel.queries + query * kernel.query_bytes, kernel.heads, block.lower, block.upper,
            bounds.scales ? block.scales : nullptr, std::min(count, seen[t] - begin), D, scores, p.paging.P);
      }
    }
}

void score_pages(const EstimateParams& p) {
  const Loops& loops = cpu::loops();
  const int64_t tasks = (int64_t{p.paging.P} + kTaskPages - 1) / kTaskPages;
  const int64_t bound = p.k_bounds.scales ? 1 : element_size(p.dtype);
  const int64_t bytes = std::min(kTaskPages, p.paging.P) * int64_t{p.size.Hkv} * 2 * p.size.D * bound;
  const int32_t group = p.size.group();
  const int64_t most =
      std::max<int64_t>(1, kMostQueries / std::max<int64_t>(1, int64_t{p.size.B} * p.size.T * p.size.Hkv));
  for (int32_t first = 0, heads; first < group; first += heads) {
    heads = static_cast<int32_t>(std::min<int64_t>(most, group - first));
    const Queries queries = split_queries(p, loops, first, heads);
    const EstimateKernelParams kernel{
        .op = p,
        .loops = loops,
        .first_head = first,
        .heads = heads,
        .queries = queries.get(),
        .query_bytes = loops.query_bytes(p.size.D)};
    torch::stable::parallel_for(0, p.size.B * tasks, grain(bytes), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        estimate_pages(kernel, static_cast<int>(i / tasks), static_cast<int>(i % tasks) * kTaskPages);
    });
  }
}

Tensor estimate(
    Tensor q, Tensor k_bounds, Tensor page_table, Tensor seq_lens, int64_t page_size, std::optional<Tensor> k_scales,
    std::optional<Tensor> new_lens) {
  EstimateParams p = check_estimate(q, k_bounds, page_table, seq_lens, page_size, k_scales, new_lens);
  const CheckedCopies copies(p);
  const int64_t B = p.size.B, T = p.size.T, Hq = p.size.Hq, P = p.paging.P;
  Tensor scores = q.dim() == 4 ? torch::stable::new_empty(q, {B, T, Hq, P}, ScalarType::Float)
                               : torch::stable::new_empty(q, {B, Hq, P}, ScalarType::Float);
  if (P == 0) return scores;  // any number of queries
  p.scores = static_cast<float*>(scores.mutable_data_ptr());
  score_pages(p);
  return scores;
}

QUEST_LIBRARY_IMPL(CPU, m) { m.impl("estimate", TORCH_BOX(&estimate)); }

}  // namespace quest::cpu
