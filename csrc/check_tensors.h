// One tensor -> what the kernels take of it, or an error that names it, what it must be and what it was. What an
// operator asks of all of its tensors is in checks.h.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

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

inline void check_dim(const Tensor& t, const char* name, int64_t dim, const char* shape) {
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

inline void check_last_stride(const Tensor& t, const char* name) {
  const int64_t last = t.dim() - 1;
  STD_TORCH_CHECK(
      last < 0 || t.size(last) <= 1 || t.stride(last) == 1, name, " must have stride 1 in its last dimension, got ",
      t.stride(last));
}

inline void check_int32(const Tensor& t, const char* name, const Tensor& like, const char* like_name) {
  STD_TORCH_CHECK(
      t.scalar_type() == ScalarType::Int, name, " must be int32, got ", torch::headeronly::toString(t.scalar_type()));
  check_same_device(t, name, like, like_name);
  check_last_stride(t, name);
}

inline DType check_dtype(const Tensor& t, const char* name) {
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
  STD_TORCH_CHECK(
      t.scalar_type() == like.scalar_type(), name, " must be ", torch::headeronly::toString(like.scalar_type()),
      " like ", like_name, ", got ", torch::headeronly::toString(t.scalar_type()));
  check_same_device(t, name, like, like_name);
  check_last_stride(t, name);
}

inline int32_t check_head_dim(const Tensor& t, const char* name) {
  const int64_t d = t.size(t.dim() - 1);
  STD_TORCH_CHECK(
      d == 64 || d == 80 || d == 96 || d == 128 || d == 192 || d == 256, name,
      " must have head_dim 64, 80, 96, 128, 192 or 256 in its last dimension, got ", d);
  return static_cast<int32_t>(d);
}

inline int32_t check_page_size(int64_t page_size, const char* name) {
  STD_TORCH_CHECK(
      page_size == 8 || page_size == 16 || page_size == 32 || page_size == 64 || page_size == 128, name,
      " must be 8, 16, 32, 64 or 128, got ", page_size);
  int32_t shift = 3;
  while ((1 << shift) < page_size) ++shift;
  return shift;
}

inline int32_t check_int32_range(int64_t value, const char* what) {
  STD_TORCH_CHECK(
      value >= 0 && value <= std::numeric_limits<int32_t>::max(), what, " must fit in 32 bits, got ", value);
  return static_cast<int32_t>(value);
}

// Pages that one sequence or list may have, as int32: their tokens are counted in int32 too. `what` names the tokens.
inline int32_t check_pages(int64_t pages, int32_t page_shift, const char* what) {
  const int64_t most = std::numeric_limits<int64_t>::max();
  check_int32_range(pages > most >> page_shift ? most : pages << page_shift, what);
  return static_cast<int32_t>(pages);
}

inline int32_t check_groups(int64_t Hq, int64_t Hkv, const char* heads, const char* kv_heads) {
  STD_TORCH_CHECK(
      Hkv > 0 && Hq > 0 && Hq % Hkv == 0, heads, " must be a positive multiple of ", kv_heads, ", got ", Hq, " and ",
      Hkv);
  return check_int32_range(Hq, heads);
}

// 16-byte vector accesses need the base and every stride but the last to be multiples of 16 bytes.
inline bool is_aligned(const Tensor& t) {
  const ScalarType type = t.scalar_type();
  const int64_t bytes = type == ScalarType::Float ? 4 : type == ScalarType::Char ? 1 : 2;
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
      .page_shift = page_shift};
}

struct Rows {  // leading sizes and strides of q, scores or pages, [B, H, X] or [B, T, H, X]
  int64_t B, T, H, stride_b, stride_t, stride_h;
};

inline constexpr int64_t kMaxNewTokens = 8;

inline Rows check_rows(const Tensor& t, const char* name, const char* shapes) {
  STD_TORCH_CHECK(t.dim() == 3 || t.dim() == 4, name, " must have shape ", shapes, ", got ", shape_string(t));
  const bool many = t.dim() == 4;
  const int64_t T = many ? t.size(1) : 1;
  STD_TORCH_CHECK(
      T >= 1 && T <= kMaxNewTokens, name, " must have 1 to ", kMaxNewTokens, " new tokens in dimension 1, got ", T);
  check_int32_range(t.size(0), "the number of sequences");
  return {t.size(0), T, t.size(many ? 2 : 1), t.stride(0), many ? t.stride(1) : 0, t.stride(many ? 2 : 1)};
}

inline Cache check_cache(
    const Tensor& t, const char* name, const Tensor& like, const char* like_name, int64_t Hkv, int64_t D) {
  check_dim(t, name, 4, "[N, Hkv, S, D]");
  check_like(t, name, like, like_name);
  check_size(t, name, 1, Hkv, "[N, Hkv, S, D]", "the number of KV heads");
  check_size(t, name, 3, D, "[N, Hkv, S, D]", "head_dim");
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2), is_aligned(t)};
}

inline void check_same_pages(const Tensor& t, const char* name, const Tensor& like, const char* like_name) {
  STD_TORCH_CHECK(
      t.size(0) == like.size(0), name, " must have as many pages as ", like_name, ", ", like.size(0), ", got ",
      t.size(0));
}

// Bounds are of the keys' dtype, or int8 where they come with scales.
inline Bounds check_bounds(
    const Tensor& t, const std::optional<Tensor>& scales, const Tensor& like, const char* like_name, int64_t Hkv,
    int64_t D) {
  check_dim(t, "k_bounds", 4, "[N, Hkv, 2, D]");
  if (scales) {
    STD_TORCH_CHECK(
        t.scalar_type() == ScalarType::Char, "k_bounds must be int8 where k_scales is given, got ",
        torch::headeronly::toString(t.scalar_type()));
    check_same_device(t, "k_bounds", like, like_name);
    check_last_stride(t, "k_bounds");
  } else {
    STD_TORCH_CHECK(t.scalar_type() != ScalarType::Char, "k_bounds of int8 needs k_scales, got none");
    check_like(t, "k_bounds", like, like_name);
  }
  check_size(t, "k_bounds", 1, Hkv, "[N, Hkv, 2, D]", "the number of KV heads");
  check_size(t, "k_bounds", 2, 2, "[N, Hkv, 2, D]", "lower and upper");
  check_size(t, "k_bounds", 3, D, "[N, Hkv, 2, D]", "head_dim");
  Bounds bounds{
      const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1), t.stride(2), is_aligned(t), nullptr, 0, 0};
  if (!scales) return bounds;
  STD_TORCH_CHECK(
      scales->scalar_type() == ScalarType::Float, "k_scales must be float32, got ",
      torch::headeronly::toString(scales->scalar_type()));
  check_same_device(*scales, "k_scales", like, like_name);
  check_dim(*scales, "k_scales", 2, "[N, Hkv]");
  check_size(*scales, "k_scales", 0, t.size(0), "[N, Hkv]", "the pages of k_bounds");
  check_size(*scales, "k_scales", 1, Hkv, "[N, Hkv]", "the number of KV heads");
  bounds.scales = const_cast<float*>(static_cast<const float*>(scales->const_data_ptr()));
  bounds.scales_stride_n = scales->stride(0), bounds.scales_stride_h = scales->stride(1);
  // An empty tensor has no address, but null means 16-bit bounds: any address will do, as nothing is read from it.
  static float nothing;
  if (!bounds.scales) bounds.scales = &nothing;
  return bounds;
}

inline NewTokens check_new_tokens(const Tensor& t, const char* name, const Tensor& like, const char* like_name) {
  check_dim(t, name, 4, "[B, T, Hkv, D]");
  check_like(t, name, like, like_name);
  for (int64_t i = 0; i < 4; ++i) check_size(t, name, i, like.size(i), "[B, T, Hkv, D]", "the shape of k");
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2), is_aligned(t)};
}

inline const int32_t* check_optional_lens(
    const std::optional<Tensor>& t, const char* name, int64_t B, const Tensor& like, const char* like_name) {
  if (!t) return nullptr;
  check_int32(*t, name, like, like_name);
  check_dim(*t, name, 1, "[B]");
  check_size(*t, name, 0, B, "[B]", "one number a sequence");
  return static_cast<const int32_t*>(t->const_data_ptr());
}

}  // namespace quest
