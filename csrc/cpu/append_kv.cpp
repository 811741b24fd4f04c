// One task for each head of each page that a sequence's new tokens touch: it writes these tokens, then the page's
// bounds. So no two tasks share a page.
#include <torch/csrc/stable/library.h>

#include <cstring>

#include "../checks.h"
#include "../four_operators.h"
#include "../mark_written.h"
#include "../namespace.h"
#include "checked_copies.h"
#include "page_bounds.h"

namespace quest::cpu {

static void write_rows(
    const NewTokens& from, const Cache& to, const AppendParams& p, int b, int h, int t, int n, int64_t page, int slot) {
  const std::byte* src = element(from.data, b * from.stride_b + t * from.stride_t + h * from.stride_h, p.dtype);
  std::byte* dst = element(to.data, page * to.stride_n + h * to.stride_h + slot * to.stride_s, p.dtype);
  const int64_t size = element_size(p.dtype);
  for (int i = 0; i < n; ++i)
    std::memcpy(dst + i * to.stride_s * size, src + i * from.stride_t * size, p.size.D * size);
}

static void append_page(const AppendParams& p, const Loops& loops, int b, int h, int touched) {
  const int32_t length = p.paging.length(b), count = p.new_tokens(b), page_size = p.paging.page_size();
  const int32_t logical = (length >> p.paging.page_shift) + touched;
  const int64_t start = int64_t{logical} << p.paging.page_shift;
  const int64_t first = std::max<int64_t>(start, length),
                last = std::min<int64_t>(start + page_size, int64_t{length} + count);
  if (first >= last) return;  // the checked copy of the page table may have no such entry
  const int64_t page = p.paging.physical(b, logical);
  if (page < 0) return;
  const int t = static_cast<int>(first - length), n = static_cast<int>(last - first);
  const int slot = static_cast<int>(first - start);
  write_rows(p.k, p.k_cache, p, b, h, t, n, page, slot);
  write_rows(p.v, p.v_cache, p, b, h, t, n, page, slot);
  renew_page_bounds(loops, p.k_cache, p.k_bounds, p.dtype, page, h, slot + n, p.size.D);
}

void append_until(
    Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor k_bounds, Tensor page_table, Tensor seq_lens,
    std::optional<Tensor> new_lens, std::optional<Tensor> k_scales, std::optional<double> std_factor,
    std::optional<Tensor> end_lens) {
  AppendParams p = check_append_kv(
      k, v, k_cache, v_cache, k_bounds, page_table, seq_lens, new_lens, k_scales, std_factor, "seq_lens", end_lens);
  const CheckedCopies copies(p);
  mark_written({{"k_cache", k_cache}, {"v_cache", v_cache}, {"k_bounds", k_bounds}}, k_scales);
  const int64_t heads = p.size.Hkv, tasks = int64_t{p.size.B} * p.max_touched * heads;
  const int64_t bytes = int64_t{p.paging.page_size()} * p.size.D * element_size(p.dtype);
  const Loops& loops = cpu::loops();
  torch::stable::parallel_for(0, tasks, grain(bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t page = i / heads;
      append_page(
          p, loops, static_cast<int>(page / p.max_touched), static_cast<int>(i % heads),
          static_cast<int>(page % p.max_touched));
    }
  });
}

void append_kv(
    Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor k_bounds, Tensor page_table, Tensor seq_lens,
    std::optional<Tensor> new_lens, std::optional<Tensor> k_scales, std::optional<double> std_factor) {
  append_until(k, v, k_cache, v_cache, k_bounds, page_table, seq_lens, new_lens, k_scales, std_factor, std::nullopt);
}

QUEST_LIBRARY_IMPL(CPU, m) { m.impl("append_kv", TORCH_BOX(&append_kv)); }

}  // namespace quest::cpu
