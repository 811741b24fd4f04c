// One task a list: the heads' scores become one score a page, each score an integer of the same order, and a radix
// selection finds the integer of the last page that fits. One pass in page order then writes the pages, so that the
// list is ascending and ties go to the lower page. Nothing is dropped however the scores cluster.
#include <torch/csrc/stable/library.h>

#include <bit>
#include <cmath>
#include <memory>

#include "../checks.h"
#include "../namespace.h"
#include "elements.h"
#include "simd/loops.h"

namespace quest::cpu {

static constexpr int kPasses = 8;  // over the scores of a list, about: what its work is worth

static float nan_max(float a, float b) { return b > a || b != b ? b : a; }

// One score a page for the `heads` heads from `head` on; `row` is scratch for as many floats.
static void reduce_heads(const TopkParams& p, const float* head, int heads, int n, float* reduced, float* row) {
  if (p.reduce == GroupReduce::soft) {
    std::fill_n(reduced, n, 0.0f);
    for (int g = 0; g < heads; ++g) {
      for (int i = 0; i < n; ++i) row[i] = head[g * p.stride_h + i] * p.scale;
      const float sum = loops().exp_sum(row, n, loops().max(row, n));
      for (int i = 0; i < n; ++i) reduced[i] += row[i] / sum;
    }
    return;
  }
  std::copy_n(head, n, reduced);
  for (int g = 1; g < heads; ++g) {
    const float* other = head + g * p.stride_h;
    if (p.reduce == GroupReduce::sum)
      for (int i = 0; i < n; ++i) reduced[i] += other[i];
    else
      for (int i = 0; i < n; ++i) reduced[i] = nan_max(reduced[i], other[i]);
  }
}

// Larger floats have larger keys; both zeros have the same one, and NaN the largest.
static uint32_t order_key(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x + 0.0f);
  if (x != x) return 0xffffffff;
  return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}

struct Threshold {
  uint32_t key;  // all pages above it are selected,
  int ties;      // and of those at it the first so many
};

static Threshold select_largest(const uint32_t* keys, int n, int k) {
  uint32_t prefix = 0, mask = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    int counts[256] = {};
    for (int i = 0; i < n; ++i)
      if ((keys[i] & mask) == prefix) ++counts[keys[i] >> shift & 0xff];
    uint32_t digit = 255;
    while (counts[digit] < k) k -= counts[digit--];
    prefix |= digit << shift;
    mask |= 0xffu << shift;
  }
  return {prefix, k};
}

struct Scratch {
  uint32_t* keys;
  float *reduced, *row;  // each of P
};

static void select_list(const TopkParams& p, int64_t list, const Scratch& scratch) {
  const int T = p.size.T, h = static_cast<int>(list % p.Hs), t = static_cast<int>(list / p.Hs % T);
  const int b = static_cast<int>(list / p.Hs / T), heads = p.size.Hq / p.Hs;
  const int n = p.paging.pages_of(p.paging.visible(b, t, T));
  int32_t* out = p.pages + list * p.K;
  int32_t* const out_end = out + p.K;
  if (n <= p.K) {
    for (int i = 0; i < n; ++i) *out++ = i;
    std::fill(out, out_end, -1);
    return;
  }
  const float* head = p.scores + b * p.stride_b + t * p.stride_t + h * heads * p.stride_h;
  uint32_t* const keys = scratch.keys;
  reduce_heads(p, head, heads, n, scratch.reduced, scratch.row);
  for (int i = 0; i < n; ++i) keys[i] = order_key(scratch.reduced[i]);

  const int recent = n - p.recent_pages;  // n > K, so that forced pages do not overlap
  const int free = p.K - p.sink_pages - p.recent_pages;
  for (int i = 0; i < p.sink_pages; ++i) *out++ = i;
  if (free > 0) {
    Threshold last = select_largest(keys + p.sink_pages, recent - p.sink_pages, free);
    for (int i = p.sink_pages; i < recent; ++i)
      if (keys[i] > last.key || (keys[i] == last.key && last.ties-- > 0)) *out++ = i;
  }
  for (int i = recent; i < n; ++i) *out++ = i;
}

Tensor topk_pages(
    Tensor scores, Tensor seq_lens, int64_t page_size, int64_t k, int64_t num_kv_heads, int64_t group_reduce,
    int64_t sink_pages, int64_t recent_pages, double scale) {
  TopkParams p =
      check_topk_pages(scores, seq_lens, page_size, k, num_kv_heads, group_reduce, sink_pages, recent_pages, scale);
  check_values(p);
  const int64_t B = p.size.B, T = p.size.T, Hs = p.Hs, K = p.K;
  Tensor pages = scores.dim() == 4 ? torch::stable::new_empty(scores, {B, T, Hs, K}, ScalarType::Int)
                                   : torch::stable::new_empty(scores, {B, Hs, K}, ScalarType::Int);
  p.pages = static_cast<int32_t*>(pages.mutable_data_ptr());
  // A worker owns a scratch and takes every workers-th list.
  const int64_t lists = B * T * Hs, workers = std::min<int64_t>(lists, torch::stable::get_num_threads());
  const int64_t P = p.paging.P, bytes = workers ? lists / workers * P * kPasses * 4 : 0;
  const auto keys = std::make_unique_for_overwrite<uint32_t[]>(workers * P);
  const auto floats = std::make_unique_for_overwrite<float[]>(workers * 2 * P);
  torch::stable::parallel_for(0, workers, grain(bytes), [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      float* const own = floats.get() + worker * 2 * P;
      const Scratch scratch{keys.get() + worker * P, own, own + P};
      for (int64_t list = worker; list < lists; list += workers) select_list(p, list, scratch);
    }
  });
  return pages;
}

QUEST_LIBRARY_IMPL(CPU, m) { m.impl("topk_pages", TORCH_BOX(&topk_pages)); }

}  // namespace quest::cpu
