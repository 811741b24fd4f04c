// Addresses of elements whose dtype is known at run time only, and how much work is worth a thread.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "../params.h"

namespace quest::cpu {

inline constexpr int kMaxHeadDim = 256;

inline int64_t element_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

inline const std::byte* element(const void* base, int64_t offset, DType dtype) {
  return static_cast<const std::byte*>(base) + offset * element_size(dtype);
}
inline std::byte* element(void* base, int64_t offset, DType dtype) {
  return static_cast<std::byte*>(base) + offset * element_size(dtype);
}

// Tasks that a thread should have at least, each of about so many bytes: less is done before the other thread wakes.
inline int64_t grain(int64_t bytes) { return std::max<int64_t>(1, 65536 / std::max<int64_t>(1, bytes)); }

}  // namespace quest::cpu
