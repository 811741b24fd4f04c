// Attention over lists of pages, in two steps. A task takes one chunk of a list, of a fixed number of tokens, with all
// the query rows that share the list; it leaves the chunk's maximum, sum of exponentials and weighted values. Then the
// chunks of each row are merged in their order. So what a row gets depends on its list and length alone.
//
// Without pages every page is listed, and the T new tokens of a sequence share the list: each row sees its own prefix.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "../checks.h"
#include "../namespace.h"
#include "elements.h"
#include "simd/loops.h"

namespace quest::cpu {

static constexpr int kChunkTokens = 512;
static constexpr int kRows = 16;  // query rows at a time
static constexpr float kInf = std::numeric_limits<float>::infinity();

// The query rows that read one list of pages: `heads` heads from `head` on, of `tokens` new tokens from t on.
struct List {
  int b, t, tokens, head, heads, kv_head;
  const int32_t* pages;  // null: page i is i
  int entries;           // up to the last visible page

  int rows() const { return tokens * heads; }
  int token(int row) const { return t + row / heads; }
  int64_t query(int row, const Sizes& size) const {
    return (int64_t{b} * size.T + token(row)) * size.Hq + head + row % heads;
  }
};

static int64_t count_lists(const DecodeParams& p) {
  return p.pages ? int64_t{p.size.B} * p.size.T * p.Hs : int64_t{p.size.B} * p.size.Hkv;
}

static List find_list(const DecodeParams& p, int64_t index) {
  List list{};
  const int h = static_cast<int>(index % p.Hs);
  const int64_t row = index / p.Hs;
  list.b = static_cast<int>(p.pages ? row / p.size.T : row);
  list.t = static_cast<int>(p.pages ? row % p.size.T : 0);
  list.tokens = p.pages ? 1 : p.size.T;
  list.heads = p.size.Hq / p.Hs;
  list.head = h * list.heads;
  list.kv_head = list.head / p.size.group();
  const int visible = p.paging.pages_of(p.paging.visible(list.b, list.t + list.tokens - 1, p.size.T));
  list.entries = p.pages ? p.K : visible;
  if (p.pages) {
    list.pages = p.pages + list.b * p.pages_stride_b + list.t * p.pages_stride_t + h * p.pages_stride_h;
    const auto seen = [&](int32_t page) { return page >= 0 && page < visible; };
    while (list.entries > 0 && !seen(list.pages[list.entries - 1])) --list.entries;
  }
  return list;
}

// What the chunks leave. The tasks of one sequence and token go chunk by chunk and, in a chunk, head by head, for the
// heads of a page lie together. Row r of a task has index task * rows + r.
struct Partials {
  std::vector<int64_t> first_task;  // [lists / Hs + 1]
  int64_t rows;                     // of a list, the same for all
  std::unique_ptr<float[]> max, sum, out;
};

// The tokens of one chunk of a list, in its order, that some row of the list sees.
struct Tokens {
  int n;
  const void *keys[kChunkTokens], *values[kChunkTokens];
};

static void find_tokens(const DecodeParams& p, const List& list, int chunk, Tokens& tokens) {
  const int shift = p.paging.page_shift, pages = kChunkTokens >> shift;
  const int last = std::min((chunk + 1) * pages, list.entries);
  const int visible = p.paging.visible(list.b, list.t + list.tokens - 1, p.size.T);
  int n = 0;
  for (int i = chunk * pages; i < last; ++i) {
    const int logical = list.pages ? list.pages[i] : i;
    const int64_t page = p.paging.physical(list.b, logical);
    if (page < 0) continue;
    const int64_t key = page * p.k_cache.stride_n + list.kv_head * p.k_cache.stride_h;
    const int64_t value = page * p.v_cache.stride_n + list.kv_head * p.v_cache.stride_h;
    const int seen = std::clamp(visible - (logical << shift), 0, p.paging.page_size());
    for (int slot = 0; slot < seen; ++slot, ++n) {
      tokens.keys[n] = element(p.k_cache.data, key + slot * p.k_cache.stride_s, p.dtype);
      tokens.values[n] = element(p.v_cache.data, value + slot * p.v_cache.stride_s, p.dtype);
    }
  }
  tokens.n = n;
}

// The weights of n scores, in their place. Scores of -inf weigh nothing, even where there are no others.
static void weigh(float* scores, int n, float& max, float& sum) {
  max = loops().max(scores, n);
  if (max == -kInf) {
    std::fill_n(scores, n, 0.0f);
    sum = 0;
  } else {
    sum = loops().exp_sum(scores, n, max);
  }
}

static void decode_rows(
    const DecodeParams& p, const List& list, const Tokens& tokens, int chunk, int first_row, int rows, float* max,
    float* sum, float* out) {
  const Loops& loop = loops();
  const int D = p.size.D, type = dtype_index(p.dtype);
  alignas(64) float q[kRows * kMaxHeadDim], weights[kRows][kChunkTokens];
  for (int r = 0; r < rows; ++r) {
    const int row = first_row + r, head = list.head + row % list.heads;
    const int64_t offset = list.b * p.q.stride_b + list.token(row) * p.q.stride_t + head * p.q.stride_h;
    loop.load[type](element(p.q.data, offset, p.dtype), D, q + r * D);
  }
  loop.dots[type](q, rows, tokens.keys, tokens.n, D, p.scale, weights[0], kChunkTokens);

  int seen[kRows];  // the row's tokens are the first so many: the tokens of the list but for new ones after its own
  for (int r = 0; r < rows; ++r) {
    const int visible = p.paging.visible(list.b, list.token(first_row + r), p.size.T);
    seen[r] = list.pages ? tokens.n : std::clamp(visible - chunk * kChunkTokens, 0, tokens.n);
    weigh(weights[r], seen[r], max[r], sum[r]);
  }
  std::fill_n(out, int64_t{rows} * D, 0.0f);
  // The first row sees the fewest tokens; what the others see beyond starts with a block, as for a row alone.
  const int common = seen[0] == seen[rows - 1] ? seen[0] : seen[0] / kBlock * kBlock;
  loop.accumulate[type](weights[0], kChunkTokens, rows, tokens.values, common, D, out);
  for (int r = 0; r < rows; ++r)
    if (seen[r] > common)
      loop.accumulate[type](weights[r] + common, 0, 1, tokens.values + common, seen[r] - common, D, out + r * D);
}

static int count_chunks(const DecodeParams& p, const List& list) {
  const int pages = kChunkTokens >> p.paging.page_shift;
  return (list.entries + pages - 1) / pages;
}

static void decode_chunk(const DecodeParams& p, const Partials& partials, const List& list, int chunk, int64_t task) {
  Tokens tokens;
  find_tokens(p, list, chunk, tokens);
  for (int r = 0; r < list.rows(); r += kRows) {
    const int64_t at = task * partials.rows + r;
    decode_rows(
        p, list, tokens, chunk, r, std::min(kRows, list.rows() - r), partials.max.get() + at, partials.sum.get() + at,
        partials.out.get() + at * p.size.D);
  }
}

static void merge_row(const DecodeParams& p, const Partials& partials, int64_t index, int row) {
  constexpr int kBatch = 64;
  const Loops& loop = loops();
  const int D = p.size.D;
  const List list = find_list(p, index);
  const int64_t step = p.Hs * partials.rows;  // from chunk to chunk
  const int64_t begin = (partials.first_task[index / p.Hs] + index % p.Hs) * partials.rows + row;
  const int64_t end = begin + count_chunks(p, list) * step;
  float max = -kInf, sum = 0, weights[kBatch], out[kMaxHeadDim] = {};
  const void* outs[kBatch];
  for (int64_t at = begin; at < end; at += step) {
    const float x = partials.max[at];
    if (x > max || x != x) max = x;
  }
  const int64_t query = list.query(row, p.size);
  std::byte* const to = element(p.out, query * D, p.dtype);
  if (max == -kInf) {  // nothing to attend to, or nothing with a weight
    std::memset(to, 0, D * element_size(p.dtype));
    p.lse[query] = -kInf;
    return;
  }
  for (int64_t at = begin; at < end; at += kBatch * step) {
    const int n = static_cast<int>(std::min<int64_t>(kBatch, (end - at) / step));
    for (int i = 0; i < n; ++i) {
      weights[i] = partials.max[at + i * step];
      outs[i] = partials.out.get() + (at + i * step) * D;
    }
    loop.exp_sum(weights, n, max);
    for (int i = 0; i < n; ++i) sum += weights[i] * partials.sum[at + i * step];
    loop.accumulate[dtype_index(DType::f32)](weights, 0, 1, outs, n, D, out);
  }
  for (int d = 0; d < D; ++d) out[d] /= sum;
  loop.store[dtype_index(p.dtype)](out, D, to);
  p.lse[query] = std::isinf(max) ? max : max + std::log(sum);
}

static void decode(const DecodeParams& p) {
  const int64_t lists = count_lists(p), groups = lists / p.Hs;
  if (lists == 0) return;
  Partials partials;
  partials.rows = find_list(p, 0).rows();
  partials.first_task.resize(groups + 1);
  for (int64_t g = 0; g < groups; ++g) {
    int chunks = 0;
    for (int h = 0; h < p.Hs; ++h) chunks = std::max(chunks, count_chunks(p, find_list(p, g * p.Hs + h)));
    partials.first_task[g + 1] = partials.first_task[g] + int64_t{chunks} * p.Hs;
  }
  const int64_t tasks = partials.first_task[groups];
  partials.max = std::make_unique_for_overwrite<float[]>(tasks * partials.rows);
  partials.sum = std::make_unique_for_overwrite<float[]>(tasks * partials.rows);
  partials.out = std::make_unique_for_overwrite<float[]>(tasks * partials.rows * p.size.D);

  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const auto& first = partials.first_task;
    int64_t g = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
    for (int64_t task = begin; task < end; ++task) {
      while (first[g + 1] <= task) ++g;
      const List list = find_list(p, g * p.Hs + (task - first[g]) % p.Hs);
      const int chunk = static_cast<int>((task - first[g]) / p.Hs);
      if (chunk < count_chunks(p, list)) decode_chunk(p, partials, list, chunk, task);
    }
  });
  const int64_t bytes = (tasks / lists + 1) * p.size.D * 4;
  torch::stable::parallel_for(0, lists * partials.rows, grain(bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      merge_row(p, partials, i / partials.rows, static_cast<int>(i % partials.rows));
  });
}

std::tuple<Tensor, Tensor> sparse_decode(
    Tensor q, Tensor k_cache, Tensor v_cache, Tensor page_table, Tensor seq_lens, std::optional<Tensor> pages,
    std::optional<double> scale) {
  DecodeParams p = check_sparse_decode(q, k_cache, v_cache, page_table, seq_lens, pages, scale);
  check_values(p);
  const auto [B, T, Hq, Hkv, D] = p.size;
  const bool many = q.dim() == 4;
  Tensor out = many ? torch::stable::new_empty(q, {B, T, Hq, D}) : torch::stable::new_empty(q, {B, Hq, D});
  Tensor lse = many ? torch::stable::new_empty(q, {B, T, Hq}, ScalarType::Float)
                    : torch::stable::new_empty(q, {B, Hq}, ScalarType::Float);
  p.out = out.mutable_data_ptr();
  p.lse = static_cast<float*>(lse.mutable_data_ptr());
  decode(p);
  return {out, lse};
}

QUEST_LIBRARY_IMPL(CPU, m) { m.impl("sparse_decode", TORCH_BOX(&sparse_decode)); }

}  // namespace quest::cpu
