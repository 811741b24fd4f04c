// How append_codes encodes a key in two bits a dimension, and rerank_pages reads it.
//
// A Hadamard rotation makes the elements of a key nearly Gaussian, as in QuIP# (Tseng et al., ICML 2024). Where D is no
// power of two, blocks of the largest power of two that divides it are rotated. The four levels are equally far apart:
// -3, -1, 1 and 3 times the scale, which has the least squared error for a Gaussian. It is within 1 % of the error of
// unequal levels, and whole numbers need no table.
#pragma once

#include <cmath>

#include "params.h"

namespace quest {

// The distance of two levels, in standard deviations.
inline constexpr float kCodeStep = 0.9957f;

QUEST_HOST_DEVICE constexpr int rotated_block(int D) { return D & -D; }

// One over the square root of the block: a rotation by sums and differences is that much too large.
QUEST_HOST_DEVICE constexpr double rotation_scale(int D) {
  const int block = rotated_block(D);
  return block == 16    ? 0.25
         : block == 32  ? 0.1767766952966369
         : block == 64  ? 0.125
         : block == 128 ? 0.08838834764831845
                        : 0.0625;
}

// An element of a rotated query as the sum of two floats. One float32 sum would be off by roundings of its terms, which
// may be far larger than the score. The high parts are multiples of a unit so large that they sum exactly in any order:
// kMaxHeadDim times 3 times 2^14 units are less than 2^24. The low parts are at most half a unit.
struct RotatedParts {
  float high, low;
};

// `most` is the largest magnitude of the query's rotated elements. The unit is a normal number in float32.
QUEST_HOST_DEVICE double rotated_unit(float most) {
  int exponent = 0;
  std::frexp(most, &exponent);  // most < 2^exponent
  return std::ldexp(1.0, (exponent < -112 ? -112 : exponent) - 14);
}

QUEST_HOST_DEVICE RotatedParts split_rotated(double x, double unit) {
  const double magic = unit * 6755399441055744.0;  // 1.5 * 2^52 units: the sum has no finer bits
  const double high = (x + magic) - magic;
  const bool finite = std::fabs(static_cast<float>(high)) < INFINITY;
  return {static_cast<float>(high), finite ? static_cast<float>(x - high) : 0.f};
}

// The code of a rotated element x, from 0 to 3: the level is 2 * code - 3. `step` is the distance of two levels.
QUEST_HOST_DEVICE int key_code(float x, float step) { return (x > -step) + (x > 0.f) + (x > step); }

}  // namespace quest
