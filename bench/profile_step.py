"""Two steps of four workloads, of which the second counts, for Nsight Compute to look at (docs/performance.md).

Run it as ``ncu -k regex:decode_step_kernel --section WarpStateStats python bench/profile_step.py``, with SpeedOfLight,
SchedulerStats, MemoryWorkloadAnalysis and LaunchStats for the rest.
"""

from __future__ import annotations

import torch
from kernels import Workload, new_layer, pipeline

SHAPES = ((32, 32, 32768, 1), (32, 8, 32768, 1), (32, 8, 131072, 1), (32, 8, 32768, 8))  # heads, context, batch


def main() -> None:
    for heads, kv_heads, context, batch in SHAPES:
        w = Workload(heads, kv_heads, context, 2048, batch)
        for layer in [new_layer(w) for _ in range(2)]:
            pipeline(w, layer)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
