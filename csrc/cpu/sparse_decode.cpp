// Attention over lists of pages, by split-KV. A task attends to one split of a list with all queries that share the
// list, and leaves a partial result. Then the partials of each query are combined in order. A split is kSplitTokens
// tokens in any batch and at any capacity, so a result depends on neither.
//
// Without pages every page is listed. The T new tokens of a sequence then share the list, and each sees its own prefix.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "../checks.h"
#include "../namespace.h"
#include "checked_copies.h"
#include "elements.h"
#include "simd/loops.h"
#include "steps.h"

namespace quest::cpu {

static constexpr int kSplitTokens = 512;
static constexpr int kQueries = 16;  // at a time
static constexpr float kInf = std::numeric_limits<float>::infinity();

// A page list and the queries that read it: `heads` heads from `head` on, of `tokens` new tokens from t on.
struct List {
  int b, t, tokens, head, heads, kv_head;
  int real;              // of `tokens`; those behind are padding
  int visible;           // tokens that its last real token sees
  const int32_t* pages;  // null: page i is i
  int entries;           // up to the last visible page

  int64_t queries() const { return int64_t{tokens} * heads; }
  int token(int64_t query) const { return t + static_cast<int>(query / heads); }
  // The query's place in [B, T, Hq].
  int64_t place(int64_t query, const Sizes& size) const {
    return (int64_t{b} * size.T + token(query)) * size.Hq + head + query % heads;
  }
};

struct DecodeKernelParams {
  DecodeParams op;
  const Loops& loops;
  // Lists are [outer, Hs]. outer counts the new tokens of all sequences, or the sequences where tokens share a list.
  int64_t outer;
  int64_t queries;  // of a list
  // Scratch. The partial of task i and query j is at i * queries + j. The tasks of one outer index go split by split,
  // and in a split head by head. The heads of a page are adjacent in memory.
  std::vector<int64_t> first_task;  // [outer + 1]
  std::unique_ptr<float[]> partial_max, partial_sum, partial_out;

  int64_t tasks() const { return first_task.back(); }
};

static List find_list(const DecodeParams& p, int64_t index) {
  const int h = static_cast<int>(index % p.pages.Hs), heads = p.size.Hq / p.pages.Hs;
  const int64_t outer = index / p.pages.Hs;
  List list{
      .b = static_cast<int>(p.pages.data ? outer / p.size.T : outer),
      .t = static_cast<int>(p.pages.data ? outer % p.size.T : 0),
      .tokens = p.pages.data ? 1 : p.size.T,
      .head = h * heads,
      .heads = heads,
      .kv_head = h * heads / p.size.group(),
      .real = 1,
      .visible = 0,
      .pages = nullptr,
      .entries = 0};
  if (!p.pages.data) list.real = p.paging.new_tokens(list.b, p.size.T);
  list.visible = p.paging.visible(list.b, list.t + std::max(0, list.real - 1), p.size.T);
  const int visible = p.paging.pages_of(list.visible);
  list.entries = p.pages.data ? p.pages.K : visible;
  if (p.pages.data) {
    list.pages = p.pages.of(list.b, list.t, h);
    const auto seen = [&](int32_t page) { return page >= 0 && page < visible; };
    while (list.entries > 0 && !seen(list.pages[list.entries - 1])) --list.entries;
  }
  return list;
}

static int count_splits(const DecodeParams& p, const List& list) {
  const int pages = kSplitTokens >> p.paging.page_shift;
  return (list.entries + pages - 1) / pages;
}

// The tokens of one split of a list, in its order, that some query of the list sees.
struct Tokens {
  int n = 0;
  // The keys, the values, and the tokens that are read next.
  const void* rows[2 * kSplitTokens + kAhead];

  const void* const* keys() const { return rows; }
  const void* const* values() const { return rows + n; }

  void followed_by(const Tokens& next) {
    for (int i = 0; i < kAhead; ++i) rows[2 * n + i] = i < next.n ? next.rows[i] : nullptr;
  }
};

static void find_tokens(const DecodeParams& p, const List& list, int split, Tokens& tokens) {
  const int shift = p.paging.page_shift, pages = kSplitTokens >> shift;
  const int last = std::min((split + 1) * pages, list.entries);
  const void** const values = tokens.rows + kSplitTokens;
  int n = 0;
  for (int i = split * pages; i < last; ++i) {
    const int logical = list.pages ? list.pages[i] : i;
    const int seen = logical < 0 ? 0 : std::clamp(list.visible - (logical << shift), 0, p.paging.page_size());
    if (seen == 0) continue;  // page table entries past the last visible page are never read
    const int64_t page = p.paging.physical(list.b, logical);
    const int64_t key = page * p.k_cache.stride_n + list.kv_head * p.k_cache.stride_h;
    const int64_t value = page * p.v_cache.stride_n + list.kv_head * p.v_cache.stride_h;
    for (int slot = 0; slot < seen; ++slot, ++n) {
      tokens.rows[n] = element(p.k_cache.data, key + slot * p.k_cache.stride_s, p.dtype);
      values[n] = element(p.v_cache.data, value + slot * p.v_cache.stride_s, p.dtype);
    }
  }
  if (n < kSplitTokens) std::copy_n(values, n, tokens.rows + n);
  tokens.n = n;
}

// Replaces n scores by their weights. Scores of -inf weigh nothing, even where there are no others.
static void weigh(const Loops& loops, float* scores, int n, float& max, float& sum) {
  max = loops.max(scores, n);
  if (max == -kInf) {
    std::fill_n(scores, n, 0.0f);
    sum = 0;
  } else {
    sum = loops.exp_sum(scores, n, max);
  }
}

static void attend_queries(
    const DecodeParams& p, const Loops& loops, const List& list, const Tokens& tokens, int split, int64_t first_query,
    int queries, float* max, float* sum, float* out) {
  const int D = p.size.D, type = dtype_index(p.dtype);
  alignas(64) float q[kQueries * kMaxHeadDim], weights[kQueries][kSplitTokens];
  for (int i = 0; i < queries; ++i) {
    const int64_t query = first_query + i, head = list.head + query % list.heads;
    const int64_t offset = list.b * p.q.stride_b + list.token(query) * p.q.stride_t + head * p.q.stride_h;
    loops.load_query[type](element(p.q.data, offset, p.dtype), D, q + i * D);
  }
  loops.dots[type](q, queries, tokens.keys(), tokens.n, D, p.scale, weights[0], kSplitTokens);

  int seen[kQueries];  // tokens from the first on: all of a selected list, or the new token's prefix
  for (int i = 0; i < queries; ++i) {
    const int visible = p.paging.visible(list.b, list.token(first_query + i), p.size.T);
    seen[i] = list.pages ? tokens.n : std::clamp(visible - split * kSplitTokens, 0, tokens.n);
    weigh(loops, weights[i], seen[i], max[i], sum[i]);
  }
  std::fill_n(out, int64_t{queries} * D, 0.0f);
  // The first query sees the fewest tokens. The other queries' further tokens start with a block, as for a query alone,
  // so that their sums have the same order.
  const int common = seen[0] == seen[queries - 1] ? seen[0] : seen[0] / kBlock * kBlock;
  loops.accumulate[type](weights[0], kSplitTokens, queries, tokens.values(), common, D, out);
  for (int i = 0; i < queries; ++i)
    if (seen[i] > common)
      loops.accumulate[type](weights[i] + common, 0, 1, tokens.values() + common, seen[i] - common, D, out + i * D);
}

static void attend_split(const DecodeKernelParams& p, const List& list, const Tokens& tokens, int split, int64_t task) {
  const int64_t queries = int64_t{list.real} * list.heads;
  for (int64_t query = 0; query < queries; query += kQueries) {
    const int64_t at = task * p.queries + query;
    attend_queries(
        p.op, p.loops, list, tokens, split, query, static_cast<int>(std::min<int64_t>(kQueries, queries - query)),
        p.partial_max.get() + at, p.partial_sum.get() + at, p.partial_out.get() + at * p.op.size.D);
  }
}

static void combine_query(const DecodeKernelParams& p, int64_t index, int64_t query) {
  constexpr int kBatch = 64;  // partials at a time
  const int D = p.op.size.D, Hs = p.op.pages.Hs;
  const List list = find_list(p.op, index);
  const int64_t step = int64_t{Hs} * p.queries;  // from split to split
  const int64_t begin = (p.first_task[index / Hs] + index % Hs) * p.queries + query;
  const int64_t end = begin + (query < list.real * list.heads ? count_splits(p.op, list) * step : 0);
  float max = -kInf, sum = 0, weights[kBatch], out[kMaxHeadDim] = {};
  const void* outs[kBatch + kAhead] = {};
  for (int64_t at = begin; at < end; at += step) {
    const float x = p.partial_max[at];
    if (x > max || x != x) max = x;
  }
  const int64_t place = list.place(query, p.op.size);
  std::byte* const to = element(p.op.out, place * D, p.op.dtype);
  if (max == -kInf) {  // no token, or none with a weight
    std::memset(to, 0, D * element_size(p.op.dtype));
    p.op.lse[place] = -kInf;
    return;
  }
  for (int64_t at = begin; at < end; at += kBatch * step) {
    const int n = static_cast<int>(std::min<int64_t>(kBatch, (end - at) / step));
    for (int i = 0; i < n; ++i) {
      weights[i] = p.partial_max[at + i * step];
      outs[i] = p.partial_out.get() + (at + i * step) * D;
    }
    p.loops.exp_sum(weights, n, max);
    for (int i = 0; i < n; ++i) sum += weights[i] * p.partial_sum[at + i * step];
    p.loops.accumulate[dtype_index(DType::f32)](weights, 0, 1, outs, n, D, out);
  }
  for (int d = 0; d < D; ++d) out[d] /= sum;
  p.loops.store_output[dtype_index(p.op.dtype)](out, D, to);
  p.op.lse[place] = std::isinf(max) ? max : max + std::log(sum);
}

static DecodeKernelParams make_tasks(const DecodeParams& op) {
  const int64_t outer = int64_t{op.size.B} * (op.pages.data ? op.size.T : 1);
  DecodeKernelParams p{
      .op = op,
      .loops = loops(),
      .outer = outer,
      .queries = outer ? find_list(op, 0).queries() : 0,
      .first_task = std::vector<int64_t>(outer + 1),
      .partial_max = nullptr,
      .partial_sum = nullptr,
      .partial_out = nullptr};
  for (int64_t i = 0; i < outer; ++i) {
    int splits = 0;
    for (int h = 0; h < op.pages.Hs; ++h)
      splits = std::max(splits, count_splits(op, find_list(op, i * op.pages.Hs + h)));
    p.first_task[i + 1] = p.first_task[i] + int64_t{splits} * op.pages.Hs;
  }
  const int64_t partials = p.tasks() * p.queries;
  p.partial_max = std::make_unique_for_overwrite<float[]>(partials);
  p.partial_sum = std::make_unique_for_overwrite<float[]>(partials);
  p.partial_out = std::make_unique_for_overwrite<float[]>(partials * op.size.D);
  return p;
}

void attend_pages(const DecodeParams& op) {
  const DecodeKernelParams p = make_tasks(op);
  if (p.outer == 0) return;
  const int Hs = op.pages.Hs;
  const int64_t tokens = std::min(kSplitTokens, std::min(op.pages.K, op.paging.P) << op.paging.page_shift);
  const int64_t task_bytes = tokens * 2 * op.size.D * element_size(op.dtype);
  torch::stable::parallel_for(0, p.tasks(), grain(task_bytes), [&](int64_t begin, int64_t end) {
    const std::vector<int64_t>& first = p.first_task;
    int64_t outer = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    struct Task {
      List list;
      int split;
      Tokens tokens;
    } both[2];
    const auto find = [&](int64_t task, Task& to) {
      to.tokens.n = 0;
      if (task == end) return;
      while (first[outer + 1] <= task) ++outer;
      to.list = find_list(op, outer * Hs + (task - first[outer]) % Hs);
      to.split = static_cast<int>((task - first[outer]) / Hs);
      if (to.split < count_splits(op, to.list)) find_tokens(op, to.list, to.split, to.tokens);
    };
    find(begin, both[0]);
    for (int64_t task = begin; task < end; ++task) {
      Task &now = both[(task - begin) % 2], &next = both[(task - begin + 1) % 2];
      find(task + 1, next);
      now.tokens.followed_by(next.tokens);
      if (now.split < count_splits(op, now.list)) attend_split(p, now.list, now.tokens, now.split, task);
    }
  });
  const int64_t lists = p.outer * Hs, bytes = (p.tasks() / lists + 1) * op.size.D * 4;
  torch::stable::parallel_for(0, lists * p.queries, grain(bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) combine_query(p, i / p.queries, i % p.queries);
  });
}

std::tuple<Tensor, Tensor> sparse_decode(
    Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor seq_lens, std::optional<Tensor> pages,
    std::optional<double> scale, std::optional<Tensor> new_lens) {
  DecodeParams p = check_sparse_decode(q, k_cache, v_cache, page_table, seq_lens, pages, scale, new_lens);
  const CheckedCopies copies(p);
  const auto [B, T, Hq, Hkv, D] = p.size;
  const bool has_tokens = q.dim() == 4;
  Tensor out = has_tokens ? torch::stable::new_empty(q, {B, T, Hq, D}) : torch::stable::new_empty(q, {B, Hq, D});
  Tensor lse = has_tokens ? torch::stable::new_empty(q, {B, T, Hq}, ScalarType::Float)
                          : torch::stable::new_empty(q, {B, Hq}, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  attend_pages(p);
  return {out, lse};
}

QUEST_LIBRARY_IMPL(CPU, m) { m.impl("sparse_decode", TORCH_BOX(&sparse_decode)); }

}  // namespace quest::cpu
