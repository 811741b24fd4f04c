// For any processor: vectors of four floats, which compilers map to SSE2 or NEON.
#define QUEST_ISA generic
#define QUEST_WIDTH 4
#include "loops_impl.h"
