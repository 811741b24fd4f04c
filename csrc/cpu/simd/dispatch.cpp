#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "loops.h"

namespace quest::cpu {

// The builds that this processor runs, the best first.
static std::vector<const Loops*> available() {
  std::vector<const Loops*> builds{&generic::kLoops};
#if defined(__x86_64__)
  const auto add = [&](bool runs, const Loops& build) {
    if (runs) builds.insert(builds.begin(), &build);
    return runs;
  };
  add(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"),
      avx2::kLoops) &&
      add(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"),
          avx512::kLoops) &&
      add(__builtin_cpu_supports("avx512vnni"), avx512_vnni::kLoops);
#endif
  return builds;
}

struct Choice {
  const Loops* loops;
  std::string error;  // where there are none
};

static Choice choose() {
  const std::vector<const Loops*> builds = available();
  const char* const asked = std::getenv("QUEST_OPS_ISA");
  if (!asked || !*asked) return {builds.front(), {}};
  std::string names;
  for (const Loops* build : builds) {
    if (asked == std::string(build->name)) return {build, {}};
    names += (names.empty() ? "" : ", ") + std::string(build->name);
  }
  return {nullptr, "QUEST_OPS_ISA must be an instruction set of this processor (" + names + "), got " + asked};
}

static const Choice& chosen() {
  static const Choice choice = choose();
  return choice;
}

const Loops& loops() {
  STD_TORCH_CHECK(chosen().loops, chosen().error);
  return *chosen().loops;
}

const char* isa_name() { return chosen().loops ? chosen().loops->name : "none"; }

}  // namespace quest::cpu
