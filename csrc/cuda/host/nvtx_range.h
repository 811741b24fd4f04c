// NVTX ranges around the operators, named as the paper's stages, where QUEST_OPS_NVTX=1 asks for them.
#pragma once

#include <nvtx3/nvToolsExt.h>

#include <cstdlib>
#include <string_view>

namespace quest::cuda {

class NvtxRange {
 public:
  explicit NvtxRange(const char* name) {
    if (enabled()) nvtxRangePushA(name);
  }
  ~NvtxRange() {
    if (enabled()) nvtxRangePop();
  }
  NvtxRange(const NvtxRange&) = delete;
  NvtxRange& operator=(const NvtxRange&) = delete;

 private:
  static bool enabled() {
    static const bool on = [] {
      const char* v = std::getenv("QUEST_OPS_NVTX");
      return v && *v && std::string_view(v) != "0";
    }();
    return on;
  }
};

}  // namespace quest::cuda
