// One task for each head of each page of a sequence; those before the page of first_token do nothing.
#include <torch/csrc/stable/library.h>

#include "../checks.h"
#include "../mark_written.h"
#include "../namespace.h"
#include "checked_copies.h"
#include "page_bounds.h"

namespace quest::cpu {

static void update_page(const UpdateBoundsParams& p, const Loops& loops, int b, int h, int logical) {
  const int64_t keys = p.paging.length(b) - (int64_t{logical} << p.paging.page_shift);
  // The checked copy of the page table may have no entry for a page that is not updated.
  if (keys <= 0 || (p.first_token && logical < p.first_token[b] >> p.paging.page_shift)) return;
  const int64_t page = p.paging.physical(b, logical);
  if (page < 0) return;
  const int n = static_cast<int>(std::min<int64_t>(keys, p.paging.page_size()));
  renew_page_bounds(loops, p.k_cache, p.k_bounds, p.dtype, page, h, n, p.size.D);
}

void update_bounds(
    Tensor k_cache, Tensor k_bounds, Tensor page_table, Tensor seq_lens, std::optional<Tensor> first_token,
    std::optional<Tensor> k_scales, std::optional<double> std_factor) {
  UpdateBoundsParams p =
      check_update_bounds(k_cache, k_bounds, page_table, seq_lens, first_token, k_scales, std_factor);
  const CheckedCopies copies(p);
  mark_written({{"k_bounds", k_bounds}}, k_scales);
  const int64_t heads = p.size.Hkv, pages = p.paging.P, tasks = p.size.B * pages * heads;
  const int64_t bytes = int64_t{p.paging.page_size()} * p.size.D * element_size(p.dtype);
  const Loops& loops = cpu::loops();
  torch::stable::parallel_for(0, tasks, grain(bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t page = i / heads;
      update_page(
          p, loops, static_cast<int>(page / pages), static_cast<int>(i % heads), static_cast<int>(page % pages));
    }
  });
}

QUEST_LIBRARY_IMPL(CPU, m) { m.impl("update_bounds", TORCH_BOX(&update_bounds)); }

}  // namespace quest::cpu
