// One task a list. The heads' scores are reduced to one score a page, and each score to an integer key of the same
// order. A radix selection finds the key of the last page that fits. One pass in page order then writes the pages, so
// the list is ascending and ties go to the lower page. The selection is exact however the scores cluster.
#include <torch/csrc/stable/library.h>

#include <bit>
#include <cmath>
#include <memory>

#include "../checks.h"
#include "../namespace.h"
#include "checked_copies.h"
#include "elements.h"
#include "simd/loops.h"
#include "steps.h"

namespace quest::cpu {

static constexpr int kPasses = 6;  // over the scores of a list, about

struct TopkKernelParams {
  TopkParams op;
  const Loops& loops;
  // Scratch of each worker.
  uint32_t *keys, *candidates;  // [workers, P]
  float *reduced, *scaled;      // [workers, P]
};

static float nan_max(float a, float b) { return b > a || b != b ? b : a; }

// One score a page from `heads` heads, `scores` being those of the first; `scaled` is scratch.
static void reduce_heads(
    const TopkParams& p, const Loops& loops, const float* scores, int heads, int n, float* reduced, float* scaled) {
  switch (p.reduce) {
    case GroupReduce::none: std::copy_n(scores, n, reduced); return;
    case GroupReduce::max:
      std::copy_n(scores, n, reduced);
      for (int g = 1; g < heads; ++g)
        for (int i = 0; i < n; ++i) reduced[i] = nan_max(reduced[i], scores[g * p.stride_h + i]);
      return;
    case GroupReduce::sum:
      std::copy_n(scores, n, reduced);
      for (int g = 1; g < heads; ++g)
        for (int i = 0; i < n; ++i) reduced[i] += scores[g * p.stride_h + i];
      return;
    case GroupReduce::soft:
      std::fill_n(reduced, n, 0.0f);
      for (int g = 0; g < heads; ++g) {
        for (int i = 0; i < n; ++i) scaled[i] = scores[g * p.stride_h + i] * p.scale;
        const float sum = loops.exp_sum(scaled, n, loops.max(scaled, n));
        for (int i = 0; i < n; ++i) reduced[i] += scaled[i] / sum;
      }
      return;
  }
  STD_TORCH_CHECK(false, "group_reduce must be 0 to 3, got ", static_cast<int32_t>(p.reduce));
}

// Larger floats have larger keys; both zeros have the same one, and NaN the largest.
static uint32_t order_key(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x + 0.0f);
  if (x != x) return 0xffffffff;
  return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}

struct Threshold {
  uint32_t key;  // pages with a larger one are selected
  int ties;      // and this many of those that have it
};

// Finds the key digit by digit. Only keys with the digits found so far stay candidates.
static Threshold select_largest(const uint32_t* keys, int n, int k, uint32_t* candidates) {
  uint32_t prefix = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    int counts[256] = {};
    for (int i = 0; i < n; ++i) ++counts[keys[i] >> shift & 0xff];
    uint32_t digit = 255;
    while (counts[digit] < k) k -= counts[digit--];
    prefix |= digit << shift;
    if (shift == 0) break;
    int left = 0;
    for (int i = 0; i < n; ++i) {  // no branch: scores are in no order
      const uint32_t key = keys[i];
      candidates[left] = key;
      left += (key >> shift & 0xff) == digit;
    }
    keys = candidates, n = left;
  }
  return {prefix, k};
}

static void select_list(const TopkKernelParams& kernel, int64_t list, int64_t worker) {
  const TopkParams& p = kernel.op;
  const int T = p.size.T, h = static_cast<int>(list % p.Hs), t = static_cast<int>(list / p.Hs % T);
  const int b = static_cast<int>(list / p.Hs / T), heads = p.size.Hq / p.Hs;
  const int n = p.paging.pages_of(p.paging.visible(b, t, T)), K = pages_to_select(p, b, p.paging.length(b));
  int32_t* out = p.pages + list * p.K;
  int32_t* const out_end = out + p.K;
  if (n <= K) {
    for (int i = 0; i < n; ++i) *out++ = i;
    std::fill(out, out_end, -1);
    return;
  }
  const float* scores = p.scores + b * p.stride_b + t * p.stride_t + h * heads * p.stride_h;
  const int64_t own = worker * p.paging.P;
  uint32_t* const keys = kernel.keys + own;
  float* const reduced = kernel.reduced + own;
  reduce_heads(p, kernel.loops, scores, heads, n, reduced, kernel.scaled + own);
  for (int i = 0; i < n; ++i) keys[i] = order_key(reduced[i]);

  const int recent = n - p.recent_pages;  // n > K, so that forced pages do not overlap
  const int free = K - p.sink_pages - p.recent_pages;
  for (int i = 0; i < p.sink_pages; ++i) *out++ = i;
  if (free > 0) {
    Threshold last = select_largest(keys + p.sink_pages, recent - p.sink_pages, free, kernel.candidates + own);
    for (int i = p.sink_pages; i < recent; ++i)
      if (keys[i] > last.key || (keys[i] == last.key && last.ties-- > 0)) *out++ = i;
  }
  for (int i = recent; i < n; ++i) *out++ = i;
  std::fill(out, out_end, -1);
}

void select_pages(const TopkParams& p) {
  // A worker has scratch of its own and takes every workers-th list.
  const int64_t lists = int64_t{p.size.B} * p.size.T * p.Hs, P = p.paging.P;
  const int64_t workers = std::min<int64_t>(lists, torch::stable::get_num_threads());
  const int64_t bytes = workers ? lists / workers * P * kPasses * 4 : 0;
  const auto keys = std::make_unique_for_overwrite<uint32_t[]>(workers * 2 * P);
  const auto floats = std::make_unique_for_overwrite<float[]>(workers * 2 * P);
  const TopkKernelParams kernel{
      .op = p,
      .loops = loops(),
      .keys = keys.get(),
      .candidates = keys.get() + workers * P,
      .reduced = floats.get(),
      .scaled = floats.get() + workers * P};
  torch::stable::parallel_for(0, workers, grain(bytes), [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t list = worker; list < lists; list += workers) select_list(kernel, list, worker);
  });
}

Tensor topk_pages(
    Tensor scores, Tensor seq_lens, int64_t page_size, int64_t k, int64_t num_kv_heads, int64_t group_reduce,
    int64_t sink_pages, int64_t recent_pages, double scale, std::optional<Tensor> new_lens,
    std::optional<Tensor> budgets, int64_t dense_below) {
  TopkParams p = check_topk_pages(
      scores, seq_lens, page_size, k, num_kv_heads, group_reduce, sink_pages, recent_pages, scale, new_lens, budgets,
      dense_below);
  const CheckedCopies copies(p);
  const int64_t B = p.size.B, T = p.size.T, Hs = p.Hs, K = p.K;
  Tensor pages = scores.dim() == 4 ? torch::stable::new_empty(scores, {B, T, Hs, K}, ScalarType::Int)
                                   : torch::stable::new_empty(scores, {B, Hs, K}, ScalarType::Int);
  p.pages = static_cast<int32_t*>(pages.mutable_data_ptr());
  select_pages(p);
  return pages;
}

QUEST_LIBRARY_IMPL(CPU, m) { m.impl("topk_pages", TORCH_BOX(&topk_pages)); }

}  // namespace quest::cpu
