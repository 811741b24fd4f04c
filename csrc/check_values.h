// Lengths and page numbers, checked where they can be read: always on the CPU. On the GPU that takes a copy and a
// synchronisation, so QUEST_OPS_CHECK=1 has to ask for it.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>

#include "params.h"

namespace quest {

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

// Entries [first, last) of a sequence must be physical pages. Those past its last page are never read.
inline void check_page_table(const Paging& g, int32_t b, int32_t first, int32_t last) {
  for (int32_t i = first; i < last; ++i) {
    const int32_t page = g.page_table[b * g.page_table_stride + i];
    STD_TORCH_CHECK(
        page >= 0 && page < g.N, "page_table must hold physical pages 0 to ", g.N - 1, ", got ", page, " for sequence ",
        b, ", page ", i);
  }
}

inline void check_new_lens(const Paging& g, const Sizes& size) {
  for (int32_t b = 0; g.new_lens && b < size.B; ++b)
    STD_TORCH_CHECK(
        g.new_lens[b] >= 0 && g.new_lens[b] <= size.T, "new_lens must be 0 to ", size.T, " (T), got ", g.new_lens[b],
        " for sequence ", b);
}

// Of operators that write new tokens behind the cached ones.
template <class Params>
void check_appended(const Params& p, const char* lens_name) {
  check_seq_lens(p.paging, p.size.B, lens_name);
  check_new_lens(p.paging, p.size);
  for (int32_t b = 0; b < p.size.B; ++b) {
    const int32_t n = p.new_tokens(b), length = p.paging.seq_lens[b];
    STD_TORCH_CHECK(
        n <= p.paging.capacity() - length, "page_table must have room for ", lens_name, " + new tokens, ", length,
        " + ", n, " for sequence ", b, ", got ", p.paging.P, " pages of ", p.paging.page_size());
    if (n) check_page_table(p.paging, b, length >> p.paging.page_shift, p.paging.pages_of(length + n));
  }
}

inline void check_values(const AppendParams& p, const char* lens_name = "seq_lens") { check_appended(p, lens_name); }
inline void check_values(const AppendCodesParams& p) { check_appended(p, "seq_lens"); }

inline void check_values(const DecodeStepParams& p) {
  check_seq_lens(p.paging, p.size.B);
  check_values(p.append, "start_lens");
  for (int32_t b = 0; b < p.size.B; ++b) {
    check_page_table(p.paging, b, 0, p.paging.pages_of(p.paging.seq_lens[b]));
    const int32_t start = p.append.paging.seq_lens[b], end = p.paging.seq_lens[b];
    const int32_t n = p.paging.new_tokens(b, p.size.T);
    STD_TORCH_CHECK(
        end - start == n || (start == 0 && end == 0), "seq_lens must be start_lens + ",
        p.paging.new_lens ? "new_lens" : "T", ", ", start, " + ", n, " for sequence ", b, ", got ", end);
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
  check_new_lens(p.paging, p.size);
  for (int32_t b = 0; b < p.size.B; ++b) check_page_table(p.paging, b, 0, p.paging.pages_of(p.paging.seq_lens[b]));
}

inline void check_values(const TopkParams& p) {
  check_seq_lens(p.paging, p.size.B);
  check_new_lens(p.paging, p.size);
}

// Of operators that read lists of pages, where there are lists.
template <class Params>
void check_listed(const Params& p) {
  check_seq_lens(p.paging, p.size.B);
  check_new_lens(p.paging, p.size);
  for (int32_t b = 0; b < p.size.B; ++b) {
    check_page_table(p.paging, b, 0, p.paging.pages_of(p.paging.seq_lens[b]));
    if (!p.pages.data) continue;
    for (int32_t t = 0; t < p.size.T; ++t)
      for (int32_t h = 0; h < p.pages.Hs; ++h)
        for (int32_t i = 0; i < p.pages.K; ++i) {
          const int32_t page = p.pages.of(b, t, h)[i];
          STD_TORCH_CHECK(
              page >= -1 && page < p.paging.P, "pages must hold logical pages 0 to ", p.paging.P - 1,
              ", or -1 as padding, got ", page, " for sequence ", b, ", head ", h);
        }
  }
}

inline void check_values(const DecodeParams& p) { check_listed(p); }
inline void check_values(const RerankParams& p) { check_listed(p); }

}  // namespace quest
