#include <cutlass/version.h>

#include "build_info.h"

static std::string dotted(int major, int minor, int patch) {
  return std::to_string(major) + "." + std::to_string(minor) + "." + std::to_string(patch);
}

QUEST_EXPORT const char* quest_ops_cuda_build_info() {
  static const std::string info = quest::build_info({
      {"nvcc", dotted(__CUDACC_VER_MAJOR__, __CUDACC_VER_MINOR__, __CUDACC_VER_BUILD__)},
      {"architectures", QUEST_CUDA_ARCHITECTURES},
      {"cutlass", dotted(CUTLASS_MAJOR, CUTLASS_MINOR, CUTLASS_PATCH)},
  });
  return info.c_str();
}
