// The loops, written once over the compiler's vector types. One file for each instruction set includes them and sets
// QUEST_ISA, the namespace, and QUEST_WIDTH. Everything is static or in that namespace.
#include "attend.h"
#include "bounds.h"
#include "codes.h"
#include "score.h"
#include "vectors.h"

namespace quest::cpu::QUEST_ISA {
namespace {

template <class E>
void load_row(const void* src, int n, float* dst) {
  for (int i = 0; i < n; i += W) store(dst + i, E::load(static_cast<const typename E::Storage*>(src) + i));
}

template <class E>
void store_row(const float* src, int n, void* dst) {
  for (int i = 0; i < n; i += W) E::store(static_cast<typename E::Storage*>(dst) + i, load(src + i));
}

// ---- Softmax.

// The last n < W elements, with `fill` in the lanes past them.
QUEST_INLINE Vec load_tail(const float* x, int n, float fill) {
  float lanes[W];
  for (int i = 0; i < W; ++i) lanes[i] = i < n ? x[i] : fill;
  return load(lanes);
}

float max(const float* x, int n) {
  Vec most = splat(-kInf);
  int i = 0;
  for (; i + W <= n; i += W) most = nan_max(most, load(x + i));
  if (i < n) most = nan_max(most, load_tail(x + i, n - i, -kInf));
  return max_lane(most);
}

// ---- exp(x) for x <= 0 to about 1 ulp, as 2^k * p(r). Here k = round(x / ln 2), r = x - k ln 2, |r| <= ln(2) / 2.

QUEST_INLINE Vec exp_nonpositive(Vec x) {
  const Vec least = splat(-87.33654f);  // below it exp is denormal, and 0 here
  const Vec clamped = x < least ? least : x;
  const Vec shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23, so that the sum's last bits are k
  const Vec k = shifted - 12582912.0f;
  const Vec r = (clamped - k * 0.693359375f) - k * -2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Vec power = floats((bits(shifted) << 23) + 0x3f800000);
  return x < least ? splat(0.0f) : p * power;
}

float exp_sum(float* x, int n, float subtract) {
  Vec sum = {};
  int i = 0;
  for (; i + W <= n; i += W) {
    const Vec e = exp_nonpositive(load(x + i) - subtract);
    store(x + i, e);
    sum += e;
  }
  if (i < n) {
    const Vec e = exp_nonpositive(load_tail(x + i, n - i, -kInf) - subtract);
    for (int lane = 0; lane < n - i; ++lane) x[i + lane] = e[lane], sum[lane] += e[lane];
  }
  float result = 0;
  for (int lane = 0; lane < W; ++lane) result += sum[lane];
  return result;
}

#define QUEST_STR_(x) #x
#define QUEST_STR(x) QUEST_STR_(x)

}  // namespace

extern const Loops kLoops = {
    QUEST_STR(QUEST_ISA),
    {load_row<F32>, load_row<F16>, load_row<BF16>},  // in the order of DType
    {store_row<F32>, store_row<F16>, store_row<BF16>},
    {load_query<F32>, load_query<F16>, load_query<BF16>},
    {store_output<F32>, store_output<F16>, store_output<BF16>},
    {dots<F32>, dots<F16>, dots<BF16>},
    {accumulate<F32>, accumulate<F16>, accumulate<BF16>},
    query_bytes,
    split_query,
    {score<PlainBounds<F32>>, score<PlainBounds<F16>>, score<PlainBounds<BF16>>, score<Int8Bounds>},
    score_codes,
    {bounds<F32>, bounds<F16>, bounds<BF16>},
    store_int8,
    max,
    exp_sum};

}  // namespace quest::cpu::QUEST_ISA
