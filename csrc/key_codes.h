// How append_codes encodes a key in two bits a dimension, and rerank_pages reads it.
//
// A Hadamard rotation makes the elements of a key nearly Gaussian, as in QuIP# (Tseng et al., ICML 2024). Where D is no
// power of two, blocks of the largest power of two that divides it are rotated. The four levels are equally far apart:
// -3, -1, 1 and 3 times the scale, which has the least squared error for a Gaussian. It is within 1 % of the error of
// unequal levels, and whole numbers need no table.
#pragma once

#include "params.h"

namespace quest {

// The distance of two levels, in standard deviations.
inline constexpr float kCodeStep = 0.9957f;

QUEST_HOST_DEVICE constexpr int rotated_block(int D) { return D & -D; }

// One over the square root of the block: a rotation by sums and differences is that much too large.
QUEST_HOST_DEVICE constexpr float rotation_scale(int D) {
  const int block = rotated_block(D);
  return block == 16 ? 0.25f : block == 32 ? 0.17677669f : block == 64 ? 0.125f : block == 128 ? 0.088388346f : 0.0625f;
}

// The code of a rotated element x, from 0 to 3: the level is 2 * code - 3. `step` is the distance of two levels.
QUEST_HOST_DEVICE int key_code(float x, float step) { return (x > -step) + (x > 0.f) + (x > step); }

}  // namespace quest
