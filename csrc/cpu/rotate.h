// The Hadamard rotation of keys and queries, without its scale. Sums are in the order of the CUDA kernels.
#pragma once

#include "../key_codes.h"

namespace quest::cpu {

template <class X>
void rotate(X* x, int D) {
  for (int distance = 1; distance < rotated_block(D); distance *= 2)
    for (int i = 0; i < D; i += 2 * distance)
      for (int j = i; j < i + distance; ++j) {
        const X a = x[j], b = x[j + distance];
        x[j] = a + b, x[j + distance] = a - b;
      }
}

}  // namespace quest::cpu
