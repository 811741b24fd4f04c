// Tells autograd which tensors an operator writes, as torch's own in-place operators do. A gradient through a tensor
// that autograd saved before the call then raises, and so does a call that writes to a tensor that requires a gradient.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <array>
#include <initializer_list>
#include <optional>

namespace quest {

using torch::stable::Tensor;

struct Written {
  const char* name;
  const Tensor& tensor;
};

// The answer of an aten operator `bool name(Tensor)`.
inline bool ask(const char* name, const Tensor& t) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(t)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<bool>(stack[0]);
}

// LibTorch's stable ABI has no access to version counters. A copy of a tensor to itself moves no data, but raises the
// counter, and fails for a leaf that requires a gradient and for a view of one.
inline bool raise_version(const Tensor& t) { return aoti_torch_copy_(t.get(), t.get(), 0) == AOTI_TORCH_SUCCESS; }

inline void mark_written(const char* name, const Tensor& t, bool may_be_inference, bool gradients) {
  const auto is_inference = [&] { return ask("aten::is_inference", t); };
  if (may_be_inference && is_inference()) return;
  const bool has_history = gradients && !ask("aten::is_leaf", t);
  STD_TORCH_CHECK(
      !has_history && (raise_version(t) || is_inference()), name,
      " must not require a gradient, since it is written to: quest_ops is for decoding. Call it under torch.no_grad() "
      "or "
      "torch.inference_mode(), or detach ",
      name);
}

inline void mark_written(std::initializer_list<Written> tensors, const std::optional<Tensor>& k_scales = std::nullopt) {
  // An inference tensor has no counter, and autograd never saves one. A failed copy is slow, so the first tensor is
  // asked: usually all are such, or none.
  const bool inference = ask("aten::is_inference", tensors.begin()->tensor);
  const bool gradients = aoti_torch_grad_mode_is_enabled();
  for (const auto& [name, tensor] : tensors) mark_written(name, tensor, inference, gradients);
  if (k_scales) mark_written("k_scales", *k_scales, inference, gradients);
}

}  // namespace quest
