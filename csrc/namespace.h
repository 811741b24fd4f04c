// The operator namespace, torch.ops.<QUEST_NAMESPACE>. Two builds in one process need two namespaces.
#pragma once

#ifndef QUEST_NAMESPACE
#define QUEST_NAMESPACE quest
#endif

// STABLE_TORCH_LIBRARY pastes its arguments, so QUEST_NAMESPACE is expanded one level above it.
#define QUEST_LIBRARY_(ns, m) STABLE_TORCH_LIBRARY(ns, m)
#define QUEST_LIBRARY(m) QUEST_LIBRARY_(QUEST_NAMESPACE, m)
#define QUEST_LIBRARY_IMPL_(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)
#define QUEST_LIBRARY_IMPL(key, m) QUEST_LIBRARY_IMPL_(QUEST_NAMESPACE, key, m)

#define QUEST_STRING_(x) #x
#define QUEST_STRING(x) QUEST_STRING_(x)
