// Built with AVX2, FMA and F16C.
#define QUEST_ISA avx2
#define QUEST_WIDTH 8
#include "loops_impl.h"
