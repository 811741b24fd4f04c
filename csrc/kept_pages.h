// The lists of a step in which some sequences keep those of an earlier one, where a kernel has selected all of them.
#pragma once

#include "params.h"

namespace quest {

// Entry i of list h of sequence b. `list` is the list that topk_pages selected, and then the one to read.
QUEST_HOST_DEVICE void keep_page(const DecodeStepParams& p, int32_t b, int32_t h, int32_t i, int32_t* list) {
  const int32_t length = p.paging.visible(b, 0, 1), n = p.paging.pages_of(length), K = pages_to_select(p, b, length);
  int32_t& kept = p.kept.pages[(int64_t{b} * p.Hs + h) * p.kept.stride + i];
  if (n <= K || i >= K || !p.kept.keeps(b))
    kept = list[i];
  else if (i >= K - p.recent_pages)
    kept = list[i] = n - K + i;
  else if (const int32_t page = kept; page >= 0 && page < n - p.recent_pages)  // the tensor may have any numbers
    list[i] = page;
  else
    list[i] = -1;
}

}  // namespace quest
