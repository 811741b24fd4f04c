#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <cstring>

#include "loops.h"

namespace quest::cpu {

static const char* asked() {
  const char* name = std::getenv("QUEST_OPS_CPU_ISA");
  return name && *name ? name : nullptr;
}

// The best build up to the one asked for that the processor runs; null where none has that name.
static const Loops* choose() {
  const auto is_asked = [name = asked()](const char* isa) { return name && !std::strcmp(name, isa); };
  if (asked() && !is_asked("generic") && !is_asked("avx2") && !is_asked("avx512")) return nullptr;
#if defined(__x86_64__)
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (has_avx512 && !is_asked("avx2") && !is_asked("generic")) return &avx512::kLoops;
  if (has_avx2 && !is_asked("generic")) return &avx2::kLoops;
#endif
  return &generic::kLoops;
}

static const Loops* chosen() {
  static const Loops* const loops = choose();
  return loops;
}

const Loops& loops() {
  STD_TORCH_CHECK(chosen(), "QUEST_OPS_CPU_ISA must be generic, avx2 or avx512, got ", asked());
  return *chosen();
}

const char* isa_name() { return chosen() ? chosen()->name : "none"; }

}  // namespace quest::cpu
