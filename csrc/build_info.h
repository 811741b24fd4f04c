// A library's description of its build: a JSON object that python/quest_ops/_library.py reads.
#pragma once

#include <torch/headeronly/version.h>

#include <initializer_list>
#include <string>
#include <utility>

#include "namespace.h"

#define QUEST_EXPORT extern "C" __attribute__((visibility("default")))

namespace quest {

using BuildInfo = std::initializer_list<std::pair<const char*, std::string>>;

// The members of both libraries, then those of one.
inline std::string build_info(BuildInfo own) {
  const BuildInfo common = {
      {"namespace", QUEST_STRING(QUEST_NAMESPACE)}, {"version", QUEST_VERSION},       {"schemas", QUEST_SCHEMAS},
      {"torch_target", QUEST_TORCH_TARGET},         {"torch_headers", TORCH_VERSION}, {"build_type", QUEST_BUILD_TYPE},
  };
  std::string json;
  for (const BuildInfo& members : {common, own})
    for (const auto& [name, value] : members)
      json += (json.empty() ? "{\"" : ", \"") + std::string(name) + "\": \"" + value + "\"";
  return json + "}";
}

}  // namespace quest
