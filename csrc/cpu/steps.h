// The three parts of a decode step after append_kv, on params that are checked and whose numbers are copied.
#pragma once

#include "../params.h"

namespace quest::cpu {

void score_pages(const EstimateParams& p);
void select_pages(const TopkParams& p);
void attend_pages(const DecodeParams& p);

}  // namespace quest::cpu
