// The operators as functions, for the one that is made of the others.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace quest::cpu {

using torch::stable::Tensor;

void append_kv(
    Tensor k, Tensor v, Tensor k_cache, Tensor v_cache, Tensor k_bounds, Tensor page_table, Tensor seq_lens,
    std::optional<Tensor> new_lens, std::optional<Tensor> k_scales);
Tensor estimate(
    Tensor q, Tensor k_bounds, Tensor page_table, Tensor seq_lens, int64_t page_size, std::optional<Tensor> k_scales);
Tensor topk_pages(
    Tensor scores, Tensor seq_lens, int64_t page_size, int64_t k, int64_t num_kv_heads, int64_t group_reduce,
    int64_t sink_pages, int64_t recent_pages, double scale);
std::tuple<Tensor, Tensor> sparse_decode(
    Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor seq_lens, std::optional<Tensor> pages,
    std::optional<double> scale);

}  // namespace quest::cpu
