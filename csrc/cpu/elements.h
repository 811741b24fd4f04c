// Addresses of elements whose dtype is known at run time only, and the least work of a thread.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "../params.h"

namespace quest::cpu {

inline int64_t element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

inline const std::byte* element(const void* base, int64_t offset, DType dtype) {
  return static_cast<const std::byte*>(base) + offset * element_size(dtype);
}
inline std::byte* element(void* base, int64_t offset, DType dtype) {
  return static_cast<std::byte*>(base) + offset * element_size(dtype);
}

// The fewest tasks of a thread, where each reads about `task_bytes`. A core reads 256 KiB in about 20 us, and waking a
// second one for less does not pay.
inline int64_t grain(int64_t task_bytes) {
  constexpr int64_t kThreadBytes = 256 << 10;
  return std::max<int64_t>(1, kThreadBytes / std::max<int64_t>(1, task_bytes));
}

}  // namespace quest::cpu
