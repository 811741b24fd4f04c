// What the CPU library says of itself, as JSON; python/quest_ops/_library.py reads it.
#include <torch/headeronly/version.h>

#include <string>

#include "cpu/simd/loops.h"
#include "namespace.h"

#if defined(__clang__)
#define QUEST_COMPILER "clang " __clang_version__
#else
#define QUEST_COMPILER "gcc " __VERSION__
#endif

extern "C" __attribute__((visibility("default"))) const char* quest_ops_build_info() {
  static const std::string info =
      std::string("{\"namespace\": \"" QUEST_STRING(QUEST_NAMESPACE) "\", \"version\": \"" QUEST_VERSION
                  "\", \"schemas\": \"" QUEST_SCHEMAS "\", \"torch_target\": \"" QUEST_TORCH_TARGET
                  "\", \"torch_headers\": \"" TORCH_VERSION "\", \"compiler\": \"" QUEST_COMPILER
                  "\", \"build_type\": \"" QUEST_BUILD_TYPE "\", \"cpu_isa\": \"") +
      quest::cpu::isa_name() + "\"}";
  return info.c_str();
}
