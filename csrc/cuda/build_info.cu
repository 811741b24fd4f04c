// What the CUDA library says of itself, as JSON; python/quest_ops/_library.py reads it.
#include <cutlass/version.h>
#include <torch/headeronly/version.h>

#include "namespace.h"

#define QUEST_NVCC \
  QUEST_STRING(__CUDACC_VER_MAJOR__) "." QUEST_STRING(__CUDACC_VER_MINOR__) "." QUEST_STRING(__CUDACC_VER_BUILD__)
#define QUEST_CUTLASS QUEST_STRING(CUTLASS_MAJOR) "." QUEST_STRING(CUTLASS_MINOR) "." QUEST_STRING(CUTLASS_PATCH)

extern "C" __attribute__((visibility("default"))) const char* quest_ops_cuda_build_info() {
  return "{\"namespace\": \"" QUEST_STRING(QUEST_NAMESPACE) "\", \"version\": \"" QUEST_VERSION
         "\", \"schemas\": \"" QUEST_SCHEMAS "\", \"torch_target\": \"" QUEST_TORCH_TARGET
         "\", \"torch_headers\": \"" TORCH_VERSION "\", \"nvcc\": \"" QUEST_NVCC
         "\", \"architectures\": \"" QUEST_CUDA_ARCHITECTURES "\", \"cutlass\": \"" QUEST_CUTLASS
         "\", \"build_type\": \"" QUEST_BUILD_TYPE "\"}";
}
