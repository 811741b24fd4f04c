// Built with AVX-512 F, BW, VL and DQ, FMA and F16C.
#define QUEST_ISA avx512
#define QUEST_WIDTH 16
#include "loops_impl.h"
