#include "build_info.h"

#include "cpu/simd/loops.h"

#if defined(__clang__)
#define QUEST_COMPILER "clang " __clang_version__
#else
#define QUEST_COMPILER "gcc " __VERSION__
#endif

// Python reads this from the file, before the library is loaded.
QUEST_EXPORT const char quest_ops_namespace[] = "quest_ops_namespace=" QUEST_STRING(QUEST_NAMESPACE);

QUEST_EXPORT const char* quest_ops_build_info() {
  static const std::string info = quest::build_info({
      {"compiler", QUEST_COMPILER},
      {"cpu_isa", quest::cpu::isa_name()},
  });
  return info.c_str();
}
