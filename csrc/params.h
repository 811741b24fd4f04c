// The limits of the operators, and the plain structs that kernels read: pointers, strides in elements, sizes. No torch,
// so that a kernel builds alone.
//
//   B  sequences           Hkv  KV heads              S  page_size
//   T  new tokens each     G    Hq / Hkv, a group     N  physical pages
//   D  head_dim            Hs   selection heads:      P  logical pages a sequence may have
//   Hq query heads              Hkv or Hq             K  selected pages
#pragma once

#include <cstdint>
#include <iterator>
#include <limits>

#if defined(__CUDACC__)
#define QUEST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define QUEST_HOST_DEVICE inline
#endif

namespace quest {

// Limits. The checks, their sentences and the dispatches are made from these.
inline constexpr int32_t kHeadDims[] = {64, 80, 96, 128, 192, 256};  // ascending
inline constexpr int32_t kPageSizes[] = {4, 8, 16, 32, 64, 128};     // ascending powers of two
inline constexpr int32_t kMaxHeadDim = kHeadDims[std::size(kHeadDims) - 1];
inline constexpr int32_t kMaxNewTokens = 8;  // T of q
// Counts are int32. So N is limited, as are the tokens of a sequence, P * S, and of a list, K * S.
inline constexpr int64_t kMaxCount = std::numeric_limits<int32_t>::max();

enum class DType : int32_t { f32, f16, bf16 };

// How a group's scores become one score a page. The numbers are part of the operators' schemas.
enum class GroupReduce : int32_t { none = 0, max = 1, sum = 2, soft = 3 };

struct Sizes {
  int32_t B, T, Hq, Hkv, D;
  QUEST_HOST_DEVICE int32_t group() const { return Hq / Hkv; }
};

// Where the tokens of each sequence are. Numbers read from the tables are clamped, so no kernel leaves its tensors
// whatever the tables hold.
struct Paging {
  const int32_t* page_table;  // [B, P]
  int64_t page_table_stride;
  const int32_t* seq_lens;   // [B]
  int32_t P, N, page_shift;  // S = 1 << page_shift
  const int32_t* new_lens;   // [B] or null: T for every sequence

  QUEST_HOST_DEVICE int32_t page_size() const { return 1 << page_shift; }
  QUEST_HOST_DEVICE int32_t capacity() const { return P << page_shift; }
  // No overflow, in this order: `tokens` is at most the capacity, which is a multiple of S.
  QUEST_HOST_DEVICE int32_t pages_of(int32_t tokens) const { return (tokens + (page_size() - 1)) >> page_shift; }

  QUEST_HOST_DEVICE int32_t length(int32_t b) const {
    const int32_t n = seq_lens[b];
    return n < 0 ? 0 : n > capacity() ? capacity() : n;
  }
  // New tokens of a sequence, the first of its T; the others are padding.
  QUEST_HOST_DEVICE int32_t new_tokens(int32_t b, int32_t T) const {
    if (new_lens) [[unlikely]] {
      const int32_t n = new_lens[b];
      return n < 0 ? 0 : n > T ? T : n;
    }
    return T;
  }
  // Tokens that new token t of T may attend to: those before it, and itself. Padding sees none.
  QUEST_HOST_DEVICE int32_t visible(int32_t b, int32_t t, int32_t T) const {
    return visible_of(length(b), t, new_tokens(b, T));
  }
  static QUEST_HOST_DEVICE int32_t visible_of(int32_t length, int32_t t, int32_t new_tokens) {
    const int32_t n = length - (new_tokens - 1 - t);
    return n < 0 || t >= new_tokens ? 0 : n;
  }
  // -1 where the table holds no physical page.
  QUEST_HOST_DEVICE int32_t physical(int32_t b, int32_t logical) const {
    if (logical < 0 || logical >= P) return -1;
    const int32_t page = page_table[b * page_table_stride + logical];
    return page < 0 || page >= N ? -1 : page;
  }
};

struct Query {  // [B, T, Hq, D]; a [B, Hq, D] tensor has T = 1
  const void* data;
  int64_t stride_b, stride_t, stride_h;
  bool aligned;  // base and strides are multiples of 16 bytes; so in the structs below
};

struct Cache {  // [N, Hkv, S, D], keys or values
  void* data;
  int64_t stride_n, stride_h, stride_s;
  bool aligned;
};

// A page's summary, [N, Hkv, 2, D]: lower and upper. They are the minimum and maximum of its keys, or mean - factor *
// std and mean + factor * std.
struct Bounds {
  void* data;
  int64_t stride_n, stride_h, stride_c;  // in bytes where there are scales
  bool aligned;
  float* scales;  // [N, Hkv] or null: a bound is its whole number times the scale; else it has the cache's dtype
  int64_t scales_stride_n, scales_stride_h;
  bool packed;    // two numbers of 4 bits a byte, plus 8, the even dimension low; else int8
  bool mean_std;  // read by the writers alone, as is the factor
  float std_factor;
};

// Codes of single tokens. A rotated key is (2 * code - 3) * scale in each dimension, see key_codes.h.
struct KeyCodes {
  uint8_t* data;                         // [N, Hkv, S, D / 4]: four dimensions a byte, the first in the lowest bits
  int64_t stride_n, stride_h, stride_s;  // in bytes
  bool aligned;
  float* scales;  // [N, Hkv, S]
  int64_t scales_stride_n, scales_stride_h, scales_stride_s;
};

// Logical pages of each new token. [B, T, Hs, K], or null.
struct PageLists {
  const int32_t* data;
  int64_t stride_b, stride_t, stride_h;
  int32_t Hs, K;

  QUEST_HOST_DEVICE const int32_t* of(int b, int t, int h) const {
    return data + b * stride_b + t * stride_t + h * stride_h;
  }
};

struct NewTokens {  // [B, T, Hkv, D], keys or values
  const void* data;
  int64_t stride_b, stride_t, stride_h;
  bool aligned;
};

struct AppendParams {
  DType dtype;
  Sizes size;     // T: the most new tokens of a sequence
  Paging paging;  // seq_lens: tokens before the call
  NewTokens k, v;
  Cache k_cache, v_cache;
  Bounds k_bounds;
  const int32_t* end_lens;  // [B] or null: nothing is written behind these tokens, whatever new_lens says
  int32_t max_touched;      // the most pages that T new tokens touch

  QUEST_HOST_DEVICE int32_t new_tokens(int32_t b) const {
    const int32_t n = paging.new_tokens(b, size.T);
    if (end_lens) [[unlikely]] {
      const int32_t end = end_lens[b], length = paging.length(b);
      return end < length ? 0 : end - length < n ? end - length : n;  // end may be any number
    }
    return n;
  }
};

struct AppendCodesParams {
  DType dtype;
  Sizes size;     // T: the most new tokens of a sequence
  Paging paging;  // seq_lens: tokens before the call
  NewTokens k;
  KeyCodes codes;

  QUEST_HOST_DEVICE int32_t new_tokens(int32_t b) const { return paging.new_tokens(b, size.T); }
};

struct UpdateBoundsParams {
  DType dtype;
  Sizes size;
  Paging paging;
  Cache k_cache;
  Bounds k_bounds;
  const int32_t* first_token;  // [B] or null: every page is updated
};

struct EstimateParams {
  DType dtype;
  Sizes size;
  Paging paging;
  Query q;
  Bounds k_bounds;
  float* scores;  // [B, T, Hq, P] contiguous
};

// How the scores of a page's tokens become the page's. The numbers are part of the operator's schema.
enum class TokenReduce : int32_t { max = 0, lse = 1 };

struct RerankParams {
  DType dtype;
  Sizes size;
  Paging paging;
  Query q;
  KeyCodes codes;
  PageLists pages;
  TokenReduce reduce;
  float scale;    // of the scores, in TokenReduce::lse
  float* scores;  // [B, T, Hq, P] contiguous
};

// The pages that a sequence of `length` tokens selects: K where it is short, else its budget or num_pages.
template <class Params>
QUEST_HOST_DEVICE int32_t pages_to_select(const Params& p, int32_t b, int32_t length) {
  if (length <= p.dense_below) return p.K;
  if (p.budgets) [[unlikely]] {
    const int32_t k = p.budgets[b], forced = p.sink_pages + p.recent_pages;
    return k < forced ? forced : k > p.num_pages ? p.num_pages : k;
  }
  return p.num_pages;
}

struct TopkParams {
  Sizes size;           // D unused
  Paging paging;        // page_table unused
  const float* scores;  // [B, T, Hq, P]
  int64_t stride_b, stride_t, stride_h;
  int32_t Hs, K, sink_pages, recent_pages;  // K: the places of a list
  int32_t num_pages, dense_below;           // as in pages_to_select
  GroupReduce reduce;
  float scale;             // of the scores, in GroupReduce::soft
  const int32_t* budgets;  // [B] or null, as in pages_to_select
  int32_t* pages;          // [B, T, Hs, K] contiguous
};

// The counters of a decode step: some of all blocks on a cache line of their own, and four for each row.
constexpr int64_t kSharedCounters = 32, kHeadCounters = 4;
constexpr int64_t counters_of(int64_t B, int64_t Hkv) { return kSharedCounters + kHeadCounters * B * Hkv; }

// Lists that sequences keep for some steps. The last recent_pages places of a kept list get the newest pages.
struct KeptPages {
  int32_t* pages = nullptr;        // [B, Hs, stride] contiguous, or null
  const int32_t* steps = nullptr;  // [B]; a sequence selects in every `reselect_every`-th
  int32_t stride = 0, reselect_every = 1;

  QUEST_HOST_DEVICE bool keeps(int32_t b) const { return steps && steps[b] % reselect_every != 0; }
};

// append_kv, estimate, topk_pages and sparse_decode in one call.
struct DecodeStepParams {
  AppendParams append;  // paging.seq_lens: tokens before the step
  Sizes size;
  Paging paging;  // seq_lens: tokens with the new ones
  Query q;
  bool dense;                               // reads every page: K is P, and there are no lists
  int32_t Hs, K, sink_pages, recent_pages;  // K: the places of a list
  int32_t num_pages, dense_below;           // as in pages_to_select
  GroupReduce reduce;
  float scale;
  const int32_t* budgets;  // [B] or null, as in pages_to_select
  int32_t* counters;       // [num_counters] or null, for blocks that share work
  int64_t num_counters;
  KeptPages kept = {};
  int32_t* pages = nullptr;  // [B, T, Hs, pages_stride] contiguous, K of each list; or those of `kept`; or null: dense
  int32_t pages_stride = 0;
  void* out = nullptr;   // [B, T, Hq, D] contiguous, dtype
  float* lse = nullptr;  // [B, T, Hq] contiguous
};

struct DecodeParams {
  DType dtype;
  Sizes size;
  Paging paging;
  Query q;
  Cache k_cache, v_cache;
  PageLists pages;  // null: every page of the sequence, with Hs = Hkv and K = P
  float scale;
  void* out;   // [B, T, Hq, D] contiguous, dtype
  float* lse;  // [B, T, Hq] contiguous
};

}  // namespace quest
