// One tensor -> its params, or an error with the tensor's name, the requirement and the value found. Requirements of
// several tensors together are in checks.h.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <sstream>
#include <string>

#include "params.h"

namespace quest {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_string(const Tensor& t) {
  std::ostringstream s;
  s << "[";
  for (int64_t i = 0; i < t.dim(); ++i) s << (i ? ", " : "") << t.size(i);
  s << "]";
  return s.str();
}

inline std::string device_string(const Tensor& t) {
  return t.is_cuda() ? "cuda:" + std::to_string(t.get_device_index()) : t.is_cpu() ? "cpu" : "another device";
}

template <size_t n>
bool is_one_of(const int32_t (&values)[n], int64_t value) {
  return std::find(values, values + n, value) != values + n;
}

// "8, 16 or 32"
template <size_t n>
std::string list_string(const int32_t (&values)[n]) {
  std::ostringstream s;
  for (size_t i = 0; i < n; ++i) s << (i == 0 ? "" : i + 1 < n ? ", " : " or ") << values[i];
  return s.str();
}

// None for a required argument arrives as an undefined tensor, whose properties LibTorch cannot tell.
inline void check_given(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.defined(), name, " must be a tensor, got None");
}

inline void check_dim(const Tensor& t, const char* name, int64_t dim, const char* shape) {
  check_given(t, name);
  STD_TORCH_CHECK(t.dim() == dim, name, " must have shape ", shape, ", got ", shape_string(t));
}

inline void check_size(
    const Tensor& t, const char* name, int64_t dim, int64_t want, const char* shape, const char* why) {
  STD_TORCH_CHECK(
      t.size(dim) == want, name, " must have shape ", shape, " with ", want, " in dimension ", dim, " (", why,
      "), got ", shape_string(t));
}

inline void check_same_device(const Tensor& t, const char* name, const Tensor& like, const char* like_name) {
  STD_TORCH_CHECK(
      t.is_cuda() == like.is_cuda() && t.is_cpu() == like.is_cpu() && t.get_device_index() == like.get_device_index(),
      name, " must be on ", device_string(like), " like ", like_name, ", got ", device_string(t));
}

// A tensor without dimensions passes, for check_dim to refuse.
inline void check_last_stride(const Tensor& t, const char* name) {
  const int64_t last = t.dim() - 1;
  STD_TORCH_CHECK(
      last < 0 || t.size(last) <= 1 || t.stride(last) == 1, name, " must have stride 1 in its last dimension, got ",
      t.stride(last));
}

inline void check_int32(const Tensor& t, const char* name, const Tensor& like, const char* like_name) {
  check_given(t, name);
  STD_TORCH_CHECK(
      t.scalar_type() == ScalarType::Int, name, " must be int32, got ", torch::headeronly::toString(t.scalar_type()));
  check_same_device(t, name, like, like_name);
  check_last_stride(t, name);
}

inline DType check_dtype(const Tensor& t, const char* name) {
  check_given(t, name);
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    default: break;
  }
  STD_TORCH_CHECK(
      false, name, " must be float32, float16 or bfloat16, got ", torch::headeronly::toString(t.scalar_type()));
}

// dtype, device and last stride of a tensor that goes with `like`.
inline void check_like(const Tensor& t, const char* name, const Tensor& like, const char* like_name) {
  check_given(t, name);
  STD_TORCH_CHECK(
      t.scalar_type() == like.scalar_type(), name, " must be ", torch::headeronly::toString(like.scalar_type()),
      " like ", like_name, ", got ", torch::headeronly::toString(t.scalar_type()));
  check_same_device(t, name, like, like_name);
  check_last_stride(t, name);
}

inline int32_t check_head_dim(const Tensor& t, const char* name) {
  const int64_t d = t.size(t.dim() - 1);
  STD_TORCH_CHECK(
      is_one_of(kHeadDims, d), name, " must have head_dim ", list_string(kHeadDims), " in its last dimension, got ", d);
  return static_cast<int32_t>(d);
}

// The page size as a shift.
inline int32_t check_page_size(int64_t page_size, const char* name) {
  STD_TORCH_CHECK(is_one_of(kPageSizes, page_size), name, " must be ", list_string(kPageSizes), ", got ", page_size);
  return std::countr_zero(static_cast<uint64_t>(page_size));
}

inline int32_t check_int32_range(int64_t value, const char* what) {
  STD_TORCH_CHECK(value >= 0 && value <= kMaxCount, what, " must fit in 32 bits, got ", value);
  return static_cast<int32_t>(value);
}

// The pages of a sequence or list, whose tokens must be countable; `tokens` names these. The product of the message is
// clamped, so that it cannot overflow.
inline int32_t check_pages(int64_t pages, int32_t page_shift, const char* tokens) {
  constexpr int64_t most = std::numeric_limits<int64_t>::max();
  STD_TORCH_CHECK(
      pages >= 0 && pages <= kMaxCount >> page_shift, tokens, " must fit in 32 bits, got ",
      pages > most >> page_shift ? most : pages << page_shift);
  return static_cast<int32_t>(pages);
}

inline int32_t check_groups(int64_t Hq, int64_t Hkv, const char* heads, const char* kv_heads) {
  STD_TORCH_CHECK(
      Hkv > 0 && Hq > 0 && Hq % Hkv == 0, heads, " must be a positive multiple of ", kv_heads, ", got ", Hq, " and ",
      Hkv);
  return check_int32_range(Hq, heads);
}

// A scale beyond float32 would be infinite in the kernels.
inline float check_scale(double scale) {
  STD_TORCH_CHECK(std::abs(scale) <= std::numeric_limits<float>::max(), "scale must be a finite number, got ", scale);
  return static_cast<float>(scale);
}

// Tasks write in any order, so an expanded tensor cannot be written. Pages that overlap pass: in a view of a contiguous
// cache, those that the page table names do not.
inline void check_own_memory(const Tensor& t, const char* name) {
  for (int64_t i = 0; i < t.dim(); ++i)
    STD_TORCH_CHECK(
        t.stride(i) != 0 || t.size(i) <= 1, name,
        " must have memory of its own for each element, since it is written to, got stride 0 in dimension ", i);
}

// 16-byte vector accesses need the base and every stride but the last to be multiples of 16 bytes.
inline bool is_aligned(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  const int64_t bytes = type == ScalarType::Float ? 4 : type == ScalarType::Char || type == ScalarType::Byte ? 1 : 2;
  if (reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16) return false;
  for (int64_t i = 0; i + 1 < t.dim(); ++i)
    if (t.size(i) > 1 && t.stride(i) * bytes % 16) return false;
  return true;
}

inline Paging check_paging(
    const Tensor& page_table, const Tensor& seq_lens, int64_t B, int64_t N, int32_t page_shift, const Tensor& like,
    const char* like_name, const char* lens_name = "seq_lens") {
  check_int32(page_table, "page_table", like, like_name);
  check_int32(seq_lens, lens_name, like, like_name);
  check_dim(page_table, "page_table", 2, "[B, P]");
  check_dim(seq_lens, lens_name, 1, "[B]");
  check_size(page_table, "page_table", 0, B, "[B, P]", "one row a sequence");
  check_size(seq_lens, lens_name, 0, B, "[B]", "one length a sequence");
  return {
      .page_table = static_cast<const int32_t*>(page_table.const_data_ptr()),
      .page_table_stride = page_table.stride(0),
      .seq_lens = static_cast<const int32_t*>(seq_lens.const_data_ptr()),
      .P = check_pages(page_table.size(1), page_shift, "page_table's tokens a sequence (P * page_size)"),
      .N = check_int32_range(N, "the cache's number of pages"),
      .page_shift = page_shift,
      .new_lens = nullptr};
}

// The sizes and strides before the last dimension of q, scores or pages: [B, H, X], or [B, T, H, X].
struct Leading {
  int64_t B, T, H, stride_b, stride_t, stride_h;
};

inline Leading check_leading(const Tensor& t, const char* name, const char* shapes) {
  STD_TORCH_CHECK(t.dim() == 3 || t.dim() == 4, name, " must have shape ", shapes, ", got ", shape_string(t));
  const bool has_tokens = t.dim() == 4;
  const int64_t T = has_tokens ? t.size(1) : 1, heads = has_tokens ? 2 : 1;
  STD_TORCH_CHECK(
      T >= 1 && T <= kMaxNewTokens, name, " must have 1 to ", kMaxNewTokens, " new tokens in dimension 1, got ", T);
  check_int32_range(t.size(0), "the number of sequences");
  return {
      .B = t.size(0),
      .T = T,
      .H = t.size(heads),
      .stride_b = t.stride(0),
      .stride_t = has_tokens ? t.stride(1) : 0,
      .stride_h = t.stride(heads)};
}

// The address of a tensor. A lazy clone that is to be written first gets memory of its own.
inline void* address(const Tensor& t, bool written) {
  return written ? t.mutable_data_ptr() : const_cast<void*>(t.const_data_ptr());
}

inline Cache check_cache(
    const Tensor& t, const char* name, const Tensor& like, const char* like_name, int64_t Hkv, int64_t D,
    bool written = false) {
  check_dim(t, name, 4, "[N, Hkv, S, D]");
  check_like(t, name, like, like_name);
  check_size(t, name, 1, Hkv, "[N, Hkv, S, D]", "the number of KV heads");
  check_size(t, name, 3, D, "[N, Hkv, S, D]", "head_dim");
  return {
      .data = address(t, written),
      .stride_n = t.stride(0),
      .stride_h = t.stride(1),
      .stride_s = t.stride(2),
      .aligned = is_aligned(t)};
}

inline void check_same_pages(const Tensor& t, const char* name, const Tensor& like, const char* like_name) {
  STD_TORCH_CHECK(
      t.size(0) == like.size(0), name, " must have as many pages as ", like_name, ", ", like.size(0), ", got ",
      t.size(0));
}

// Bounds have the keys' dtype. Where they come with scales they are int8, or uint8 with two dimensions a byte.
inline Bounds check_bounds(
    const Tensor& t, const std::optional<Tensor>& scales, const Tensor& like, const char* like_name, int64_t Hkv,
    int64_t D, bool written = false, std::optional<double> std_factor = std::nullopt) {
  check_dim(t, "k_bounds", 4, "[N, Hkv, 2, D]");
  const ScalarType type = t.scalar_type();
  const bool packed = type == ScalarType::Byte;
  if (scales) {
    STD_TORCH_CHECK(
        type == ScalarType::Char || packed, "k_bounds must be int8 or uint8 where k_scales is given, got ",
        torch::headeronly::toString(type));
    check_same_device(t, "k_bounds", like, like_name);
    check_last_stride(t, "k_bounds");
  } else {
    STD_TORCH_CHECK(
        type != ScalarType::Char && !packed, "k_bounds of ", packed ? "uint8" : "int8", " needs k_scales, got none");
    check_like(t, "k_bounds", like, like_name);
  }
  check_size(t, "k_bounds", 1, Hkv, "[N, Hkv, 2, D]", "the number of KV heads");
  check_size(t, "k_bounds", 2, 2, "[N, Hkv, 2, D]", "lower and upper");
  if (packed)
    check_size(t, "k_bounds", 3, D / 2, "[N, Hkv, 2, D / 2]", "head_dim, two dimensions a byte");
  else
    check_size(t, "k_bounds", 3, D, "[N, Hkv, 2, D]", "head_dim");
  STD_TORCH_CHECK(
      !std_factor || (*std_factor >= 0 && *std_factor <= std::numeric_limits<float>::max()),
      "std_factor must be a finite number of at least 0, or None for minimum and maximum, got ", *std_factor);
  Bounds bounds{
      .data = address(t, written),
      .stride_n = t.stride(0),
      .stride_h = t.stride(1),
      .stride_c = t.stride(2),
      .aligned = is_aligned(t),
      .scales = nullptr,
      .scales_stride_n = 0,
      .scales_stride_h = 0,
      .packed = packed,
      .mean_std = std_factor.has_value(),
      .std_factor = static_cast<float>(std_factor.value_or(0))};
  if (!scales) return bounds;
  STD_TORCH_CHECK(
      scales->scalar_type() == ScalarType::Float, "k_scales must be float32, got ",
      torch::headeronly::toString(scales->scalar_type()));
  check_same_device(*scales, "k_scales", like, like_name);
  check_dim(*scales, "k_scales", 2, "[N, Hkv]");
  check_size(*scales, "k_scales", 0, t.size(0), "[N, Hkv]", "the pages of k_bounds");
  check_size(*scales, "k_scales", 1, Hkv, "[N, Hkv]", "the number of KV heads");
  bounds.scales = static_cast<float*>(address(*scales, written));
  bounds.scales_stride_n = scales->stride(0), bounds.scales_stride_h = scales->stride(1);
  // Null would mean bounds without scales, and an empty tensor's address is null. Nothing is read from this one.
  static float nothing;
  if (!bounds.scales) bounds.scales = &nothing;
  return bounds;
}

inline KeyCodes check_codes(
    const Tensor& t, const Tensor& scales, const Tensor& like, const char* like_name, int64_t Hkv, int64_t D,
    bool written = false) {
  check_dim(t, "k_codes", 4, "[N, Hkv, S, D / 4]");
  STD_TORCH_CHECK(
      t.scalar_type() == ScalarType::Byte, "k_codes must be uint8, got ", torch::headeronly::toString(t.scalar_type()));
  check_same_device(t, "k_codes", like, like_name);
  check_last_stride(t, "k_codes");
  check_size(t, "k_codes", 1, Hkv, "[N, Hkv, S, D / 4]", "the number of KV heads");
  check_size(t, "k_codes", 3, D / 4, "[N, Hkv, S, D / 4]", "head_dim, four dimensions a byte");
  check_given(scales, "code_scales");
  STD_TORCH_CHECK(
      scales.scalar_type() == ScalarType::Float, "code_scales must be float32, got ",
      torch::headeronly::toString(scales.scalar_type()));
  check_same_device(scales, "code_scales", like, like_name);
  check_dim(scales, "code_scales", 3, "[N, Hkv, S]");
  for (int64_t i = 0; i < 3; ++i)
    check_size(scales, "code_scales", i, t.size(i), "[N, Hkv, S]", "the tokens of k_codes");
  return {
      .data = static_cast<uint8_t*>(address(t, written)),
      .stride_n = t.stride(0),
      .stride_h = t.stride(1),
      .stride_s = t.stride(2),
      .aligned = is_aligned(t),
      .scales = static_cast<float*>(address(scales, written)),
      .scales_stride_n = scales.stride(0),
      .scales_stride_h = scales.stride(1),
      .scales_stride_s = scales.stride(2)};
}

inline NewTokens check_new_tokens(const Tensor& t, const char* name, const Tensor& like, const char* like_name) {
  check_dim(t, name, 4, "[B, T, Hkv, D]");
  check_like(t, name, like, like_name);
  for (int64_t i = 0; i < 4; ++i) check_size(t, name, i, like.size(i), "[B, T, Hkv, D]", "the shape of k");
  return {
      .data = t.const_data_ptr(),
      .stride_b = t.stride(0),
      .stride_t = t.stride(1),
      .stride_h = t.stride(2),
      .aligned = is_aligned(t)};
}

inline const int32_t* check_optional_lens(
    const std::optional<Tensor>& t, const char* name, int64_t B, const Tensor& like, const char* like_name) {
  if (!t) return nullptr;
  check_int32(*t, name, like, like_name);
  check_dim(*t, name, 1, "[B]");
  check_size(*t, name, 0, B, "[B]", "one number a sequence");
  return static_cast<const int32_t*>(t->const_data_ptr());
}

// K: the places of a list.
inline KeptPages check_kept_pages(
    const std::optional<Tensor>& pages, const std::optional<Tensor>& steps, int64_t reselect_every, const Tensor& q,
    const Sizes& size, int32_t Hs, int32_t K, int32_t recent_pages) {
  STD_TORCH_CHECK(
      reselect_every >= 1 && reselect_every <= kMaxCount, "reselect_every must be at least 1 and fit in 32 bits, got ",
      reselect_every);
  STD_TORCH_CHECK(
      pages.has_value() == steps.has_value(), "kept_pages and kept_steps must be given together, got ",
      pages ? "kept_pages" : "kept_steps", " alone");
  if (!pages) return {};
  check_int32(*pages, "kept_pages", q, "q");
  check_dim(*pages, "kept_pages", 3, "[B, Hs, K or more]");
  check_size(*pages, "kept_pages", 0, size.B, "[B, Hs, K or more]", "the number of sequences");
  check_size(*pages, "kept_pages", 1, Hs, "[B, Hs, K or more]", "a list for each selecting head");
  STD_TORCH_CHECK(
      pages->size(2) >= K, "kept_pages must have shape [B, Hs, K or more] with K = ", K, " in dimension 2, got ",
      shape_string(*pages));
  STD_TORCH_CHECK(pages->is_contiguous(), "kept_pages must be contiguous, got strides that are not");
  STD_TORCH_CHECK(size.T == 1, "kept_pages must be left out with several new tokens, got ", size.T, " of them");
  STD_TORCH_CHECK(recent_pages >= 1, "recent_pages must be at least 1 with kept_pages, got ", recent_pages);
  return {
      .pages = static_cast<int32_t*>(address(*pages, true)),
      .steps = check_optional_lens(steps, "kept_steps", size.B, q, "q"),
      .stride = check_int32_range(pages->size(2), "kept_pages' places"),
      .reselect_every = static_cast<int32_t>(reselect_every)};
}

inline int32_t* check_counters(const std::optional<Tensor>& t, int64_t B, int64_t Hkv, const Tensor& q) {
  if (!t) return nullptr;
  check_int32(*t, "counters", q, "q");
  check_dim(*t, "counters", 1, "[count]");
  STD_TORCH_CHECK(
      t->size(0) >= counters_of(B, Hkv), "counters must have at least ", kSharedCounters, " + ", kHeadCounters,
      " * B * Hkv = ", counters_of(B, Hkv), " numbers, got ", t->size(0));
  return static_cast<int32_t*>(address(*t, true));
}

}  // namespace quest
