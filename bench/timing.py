"""Timing on a GPU by CUDA graphs, and the kernel whose time is the read roofline."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise SystemExit(
        f"the scripts of bench/ time kernels on a GPU with triton, which comes with torch's CUDA builds ({error})"
    ) from error


@dataclass(frozen=True)
class Timing:
    """Microseconds a call, over the replays: the median and the quartiles beside it."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.1f} ({self.low:.1f}-{self.high:.1f})"


LEAST_CALLS = 12  # in a graph, so that its launch weighs little


def time_calls(calls: Sequence[Callable[[], object]], replays: int = 15) -> Timing:
    """Time one CUDA graph that makes all calls in turn, and divide by their number.

    The calls' inputs must exceed the L2 cache together, so that every call finds its bytes cold.
    """
    calls = [*calls] * math.ceil(LEAST_CALLS / len(calls))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # loads modules, compiles, fills the allocator
            call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in calls:
                call()
        graph.replay()
        times = []
        for _ in range(replays):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / len(calls))
    low, median, high = statistics.quantiles(times, n=4)
    return Timing(median, low, high)


@triton.jit
def _read(source, sink, count, block: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    x = tl.load(source + offset, mask=offset < count, other=0)
    total = tl.sum(x, 0)
    if total == 123456789:  # never true, but the compiler must keep the load
        tl.store(sink, total)


def read_call(buffer: Tensor, sink: Tensor, nbytes: int, block: int = 4096) -> Callable[[], object]:
    """A call of one kernel that only reads the first ``nbytes`` of an int32 buffer."""
    count = nbytes // 4
    return lambda: _read[(triton.cdiv(count, block),)](buffer, sink, count, block=block, num_warps=8)
