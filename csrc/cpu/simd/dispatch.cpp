#include <cstdlib>
#include <cstring>

#include "loops.h"

namespace quest::cpu {

static const Loops& choose() {
#if defined(__x86_64__)
  const char* asked = std::getenv("QUEST_OPS_CPU_ISA");
  const auto allowed = [&](const char* name) { return !asked || !*asked || !std::strcmp(asked, name); };
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (has_avx512 && allowed("avx512")) return avx512::kLoops;
  if (has_avx2 && (allowed("avx2") || allowed("avx512"))) return avx2::kLoops;
#endif
  return generic::kLoops;
}

const Loops& loops() {
  static const Loops& chosen = choose();
  return chosen;
}

const char* isa_name() { return loops().name; }

}  // namespace quest::cpu
