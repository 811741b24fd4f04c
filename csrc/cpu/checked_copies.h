// A call's own copies of its lengths and page numbers, and their checks. Each number is read from its tensor once,
// here. Another thread may change the tensors meanwhile, so a number that is read again may not be the one that was
// checked.
#pragma once

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include "../check_values.h"

namespace quest::cpu {

class CheckedCopies {
 public:
  // Each constructor points `p` to copies that live as long as this object.
  explicit CheckedCopies(AppendParams& p, const char* lens_name = "seq_lens") {
    take(p);
    check_values(p, lens_name);
  }

  explicit CheckedCopies(DecodeStepParams& p) {
    take(p.append);
    take_whole(p.paging, p.size.B);
    take(p.budgets, p.size.B);
    take(p.kept.steps, p.size.B);
    check_values(p);
  }

  explicit CheckedCopies(UpdateBoundsParams& p) {
    take(p.first_token, p.size.B);
    take(p.paging, p.size.B, [&](int32_t b) {
      const int32_t first = p.first_token ? std::max(0, p.first_token[b]) : 0;
      return std::pair(first >> p.paging.page_shift, p.paging.pages_of(p.paging.length(b)));
    });
    check_values(p);
  }

  explicit CheckedCopies(EstimateParams& p) {
    take_whole(p.paging, p.size.B);
    check_values(p);
  }

  explicit CheckedCopies(TopkParams& p) {
    take(p.paging.seq_lens, p.size.B);
    take(p.paging.new_lens, p.size.B);
    take(p.budgets, p.size.B);
    check_values(p);
  }

  explicit CheckedCopies(DecodeParams& p) {
    take_whole(p.paging, p.size.B);
    if (p.pages.data) take(p.pages, p.size);
    check_values(p);
  }

  explicit CheckedCopies(AppendCodesParams& p) {
    take_appended(p);
    check_values(p);
  }

  explicit CheckedCopies(RerankParams& p) {
    take_whole(p.paging, p.size.B);
    take(p.pages, p.size);
    check_values(p);
  }

 private:
  int32_t* allocate(int64_t count) {
    return memory_.emplace_back(std::make_unique_for_overwrite<int32_t[]>(count)).get();
  }

  // One load a number. memmove does not promise that: the one of AddressSanitizer copies bytes.
  static void read_once(const int32_t* from, int64_t count, int32_t* to) {
    for (int64_t i = 0; i < count; ++i) to[i] = __atomic_load_n(from + i, __ATOMIC_RELAXED);
  }

  // An argument that is not given stays null.
  void take(const int32_t*& numbers, int32_t count) {
    if (!numbers) return;
    int32_t* const copy = allocate(count);
    read_once(numbers, count, copy);
    numbers = copy;
  }

  // Lengths, and of each sequence the page table's entries [first, last) that the call reads.
  template <class Range>
  void take(Paging& g, int32_t B, const Range& range) {
    take(g.seq_lens, B);
    take(g.new_lens, B);
    int32_t columns = 0;
    for (int32_t b = 0; b < B; ++b) columns = std::max(columns, range(b).second);
    int32_t* const copy = allocate(int64_t{B} * columns);
    for (int64_t b = 0; b < B; ++b) {
      const auto [first, last] = range(static_cast<int32_t>(b));
      const int32_t* const row = g.page_table + b * g.page_table_stride;
      if (first < last) read_once(row + first, last - first, copy + b * columns + first);
    }
    g.page_table = copy, g.page_table_stride = columns;
  }

  void take_whole(Paging& g, int32_t B) {
    take(g, B, [&](int32_t b) { return std::pair(0, g.pages_of(g.length(b))); });
  }

  void take(AppendParams& p) {
    take(p.end_lens, p.size.B);
    take_appended(p);
  }

  // The pages that new tokens are in.
  template <class Params>
  void take_appended(Params& p) {
    take(p.paging, p.size.B, [&](int32_t b) {
      const int64_t length = p.paging.length(b), end = length + p.new_tokens(b);
      const int32_t stored = static_cast<int32_t>(std::min<int64_t>(end, p.paging.capacity()));
      return std::pair(static_cast<int32_t>(length >> p.paging.page_shift), p.paging.pages_of(stored));
    });
  }

  void take(PageLists& lists, const Sizes& size) {
    int32_t* const copy = allocate(int64_t{size.B} * size.T * lists.Hs * lists.K);
    int32_t* to = copy;
    for (int b = 0; b < size.B; ++b)
      for (int t = 0; t < size.T; ++t)
        for (int h = 0; h < lists.Hs; ++h, to += lists.K) read_once(lists.of(b, t, h), lists.K, to);
    lists.data = copy;
    lists.stride_h = lists.K, lists.stride_t = int64_t{lists.Hs} * lists.K, lists.stride_b = lists.stride_t * size.T;
  }

  std::vector<std::unique_ptr<int32_t[]>> memory_;
};

}  // namespace quest::cpu
