// Built with AVX-512 F, BW, VL, DQ and VNNI, FMA and F16C.
#define QUEST_ISA avx512_vnni
#define QUEST_WIDTH 16
#define QUEST_VNNI 1
#include "loops_impl.h"
