// Queries as the loops read them, one after another, aligned as the loops want them.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <memory>

#include "simd/loops.h"

namespace quest::cpu {

struct FreeAligned {
  void operator()(void* p) const { std::free(p); }
};
using Queries = std::unique_ptr<std::byte, FreeAligned>;

inline Queries allocate_queries(int64_t count, int64_t bytes, const char* op) {
  Queries queries(static_cast<std::byte*>(std::aligned_alloc(64, std::max<int64_t>(1, count) * bytes)));
  STD_TORCH_CHECK(queries, op, " found no memory for ", count, " queries");
  return queries;
}

}  // namespace quest::cpu
