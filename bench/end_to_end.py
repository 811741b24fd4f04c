"""Milliseconds a token of whole models, by dense attention and by Quest.

    python bench/end_to_end.py [--quick | --only TEXT ...] [--tune] [--resume] [--out FILE]

The models have the shapes of known ones and random weights (whole_model.py). A step makes one greedy token for each
sequence. On a GPU the whole step is one CUDA graph, whose pieces between the attentions are compiled. Weights are
bfloat16, or 4-bit in torch's own product. Embedding and output are always bfloat16. q, k and v are one matrix, and so
are gate and up. Dense attention and Quest share all of that in a row.

Dense attention is PyTorch's cuDNN and flash backends over contiguous caches, and this library's dense mode over pages.
The fastest of the three is the row's. Quest runs over a pool whose pages are in random order. `contents` in
whole_model.py says how keys are made.

Writes a JSON after every row, and plots beside it. Without a GPU, a tiny model runs eagerly.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from itertools import cycle, groupby, pairwise
from pathlib import Path
from typing import Any

import torch
from decode_attentions import BACKENDS, Contiguous, Nothing, Paged, cache_bytes
from hardware import default_path, machine
from quest_ops import QuestConfig
from rich.console import Console
from rich.table import Table
from torch import Tensor
from whole_model import LLAMA2_7B, LLAMA31_8B, QWEN3_8B, TINY, Model, Shape, has_int4
from workloads import named

WARM, MOST_STEPS = 3, 64  # steps before those that are timed, and all of a configuration
BUDGETS = {"cuda": ["512", "1024", "2048", "4096", "full"], "cpu": ["512", "full"]}
ALL_SPARSE = ("512", "1024", "2048")  # budgets of the default without dense layers
KEPT = ("1024", "2048")  # budgets of which a selection serves KEPT_STEPS steps as well
KEPT_STEPS = 4
DENSE_BELOW = 8192  # tokens; shorter rows are measured with it too
LEAST_CAPACITY = 8192  # a serving cache is not made for short texts alone
SPARE_BYTES = 3 << 30  # for activations, the graph and the making of keys
#: The paper's: minimum and maximum in the cache's dtype, no page forced but the last one, two dense layers.
PAPER = QuestConfig(bounds="cache", std_factor=None, sink_pages=0)
DEFAULT = QuestConfig()
PAPER_NAME, OWN_DENSE, OTHER = "paper, 2048", "own dense mode", "other kernels"

#: A stage by the names of its kernels. The first that matches counts; attention comes before products, since the
#: kernels of both may name CUTLASS.
STAGES = {
    "sparse layers": "decode_step_kernel|clear_counters|estimate_|topk_",
    "dense layers": "quest::cuda|sdpa|flash|fmha|cudnn_gen|attention",
    "matrix products": "gemm|gemv|nvjet|cutlass|cublas|splitk|_mm_|tinygemm|int4",
    OTHER: "",
}


@dataclass(frozen=True)
class Row:
    """A model at a context length and batch size."""

    shape: Shape
    weights: str
    batch: int
    context: int

    def __str__(self) -> str:
        return f"{self.shape.name}, {self.weights}, {self.context >> 10}K, B {self.batch}"

    def bytes_needed(self, dtype: torch.dtype) -> int:
        tokens = max(self.context, LEAST_CAPACITY) + MOST_STEPS
        weights = self.shape.weight_bytes(self.weights, dtype)
        return weights + cache_bytes(self.shape, [PAPER, DEFAULT], self.batch, tokens, dtype) + SPARE_BYTES


#: The rows that have targets; transformers_generate.py has another.
QUICK = [
    Row(LLAMA2_7B, "int4", 1, 32768),
    Row(LLAMA2_7B, "bf16", 1, 32768),
    Row(LLAMA31_8B, "bf16", 1, 32768),
    Row(LLAMA31_8B, "bf16", 8, 32768),
    Row(LLAMA31_8B, "bf16", 1, 131072),
    Row(LLAMA31_8B, "int4", 1, 131072),
]


def grid(shapes: list[Shape]) -> list[Row]:
    """All rows: those of 1K to 4K tokens show the break-even."""
    contexts = [1 << n for n in range(10, 18)]
    return [Row(s, w, b, c) for s in shapes for w in ("int4", "bf16") for b in (1, 8) for c in contexts]


SMALL = [Row(TINY, weights, 1, context) for weights in ("fp32", "int4") for context in (2048, 4096, 8192)]


class Timer:
    """Times a step on a device: as a CUDA graph on a GPU, as it is elsewhere.

    Args:
        device: "cuda" or "cpu".
        seconds: of the timed steps of a configuration, about.
    """

    def __init__(self, device: str, seconds: float) -> None:
        self.device, self.seconds = device, seconds

    def __call__(
        self,
        step: Callable[[Tensor], Tensor],
        batch: int,
        profiled: bool,
        period: int = 1,
        dense_layers: Sequence[bool] = (),
    ) -> dict[str, Any]:
        """Milliseconds of a step, tokens a second, and by the profiler the kernels of a step and their stages.

        Args:
            step: tokens [B] -> the next tokens [B].
            batch: B.
            profiled: whether the profiler runs.
            period: of steps that differ, over which they are averaged.
            dense_layers: whether each layer whose step is a single ``decode_step`` is dense.
        """
        tokens, stages = torch.arange(batch, device=self.device), {}
        with torch.no_grad():
            if self.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                times, stages = self._graph(step, tokens, profiled, period, dense_layers)
            else:
                times = self._eager(step, tokens, period)
        times = [statistics.fmean(times[i : i + period]) for i in range(0, len(times) - period + 1, period)]
        low, median, high = statistics.quantiles(times, n=4)
        found: dict[str, Any] = {"milliseconds": {"median": median, "low": low, "high": high}}
        found["tokens_per_second"] = batch * 1e3 / median
        if self.device == "cuda":
            found["peak_bytes"] = torch.cuda.max_memory_allocated()
        if stages:
            gaps = max(0.0, median - sum(stages["milliseconds"].values()))
            found |= {"kernels": stages["kernels"], "stages": {**stages["milliseconds"], "gaps": gaps}}
            found["other_kernels"] = stages["other_kernels"]
        return found

    def _eager(self, step: Callable[[Tensor], Tensor], tokens: Tensor, period: int) -> list[float]:
        times, count = [], WARM
        while len(times) < count:
            start = time.thread_time()  # other programs may run
            tokens = step(tokens)
            times.append(time.thread_time() - start)
            if len(times) == WARM:
                count += self._count(times[-1], period)
        return [1e3 * seconds for seconds in times[WARM:]]

    def _graph(
        self,
        step: Callable[[Tensor], Tensor],
        tokens: Tensor,
        profiled: bool,
        period: int,
        dense_layers: Sequence[bool],
    ) -> tuple[list[float], dict[str, Any]]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            tokens.copy_(step(tokens))  # compiles, loads kernels, fills the allocator
            stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                tokens.copy_(step(tokens))
            events = [torch.cuda.Event(enable_timing=True) for _ in range(MOST_STEPS)]

            def replay(count: int) -> list[float]:
                events[0].record(stream)
                for event in events[1 : count + 1]:
                    graph.replay()
                    event.record(stream)
                stream.synchronize()
                return [before.elapsed_time(after) for before, after in pairwise(events[: count + 1])]

            times = replay(self._count(replay(WARM - 1)[-1] / 1e3, period))
            stages = profile(graph, period, dense_layers) if profiled else {}
        torch.cuda.current_stream().wait_stream(stream)
        return times, stages

    def _count(self, seconds_of_step: float, period: int) -> int:
        return max(5, 3 * period, min(MOST_STEPS - WARM - 1 - period, round(self.seconds / seconds_of_step)))


def profile(graph: torch.cuda.CUDAGraph, replays: int, dense_layers: Sequence[bool]) -> dict[str, Any]:
    """The kernels, copies and fills of a replay: their number, and the milliseconds of each stage, as means."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(replays):
            graph.replay()
        torch.cuda.synchronize()
    kernels = [event for event in found.events() if event.device_type == DeviceType.CUDA]
    kernels.sort(key=lambda event: event.time_range.start)
    dense = cycle(dense_layers)  # of the next decode_step: dense and sparse layers run the same kernel
    if not kernels:
        warnings.warn("the profiler saw no kernels, so there are no stages", stacklevel=2)
        return {}
    stages, small = dict.fromkeys(STAGES, 0.0), Counter[str]()
    for kernel in kernels:
        stage, ms = stage_of(kernel.name), kernel.time_range.elapsed_us() / 1e3 / replays
        if "decode_step_kernel" in kernel.name and next(dense, False):
            stage = "dense layers"
        stages[stage] += ms
        if stage == OTHER:
            small[kernel.name] += ms
    return {"kernels": len(kernels) // replays, "milliseconds": stages, "other_kernels": dict(small.most_common())}


def stage_of(kernel: str) -> str:
    return next(stage for stage, names in STAGES.items() if re.search(names, kernel, re.IGNORECASE))


def measure(row: Row, model: Model, timer: Timer, budgets: list[str], without: dict[str, Any]) -> dict[str, Any]:
    """A row's figures: each dense attention's, and each of Quest's configurations'.

    Args:
        row: of the grid.
        model: of its shape and weights.
        timer: of steps.
        budgets: of the default configuration, in tokens or "full".
        without: the figures of a step without attention.
    """
    shape, batch, context = row.shape, row.batch, row.context
    placed = {"dtype": model.dtype, "device": model.device}

    def timed(attention: Contiguous | Paged, profiled: bool = True, period: int = 1) -> dict[str, Any]:
        found = timer(lambda tokens: model.step(tokens, attention), batch, profiled, period, attention.dense_layers())
        ms = found["milliseconds"]["median"]
        return {**found, "attention_share": 1 - without["milliseconds"]["median"] / ms}

    dense: dict[str, Any] = {}
    contiguous = Contiguous(shape, batch, context, **placed)
    for name, backend in BACKENDS[model.device].items():
        contiguous.backend = backend
        try:
            dense[name] = timed(contiguous)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # a backend that does not take this shape, or not on this GPU
            print(f"{row}: {name} does not run: {str(error).splitlines()[0][:100]}")
    del contiguous
    free_memory()

    # Timed steps move the lengths: half of them lie below the row's context and half above.
    sizes = (batch, context - MOST_STEPS // 2, MOST_STEPS, max(context, LEAST_CAPACITY))
    quest: dict[str, Any] = {}
    attention = Paged(shape, PAPER, *sizes, **placed)
    quest[PAPER_NAME] = timed(attention)
    del attention
    free_memory()
    attention = Paged(shape, DEFAULT, *sizes, **placed)
    differs = attention.selections_differ()
    for budget in budgets:
        tokens = context + MOST_STEPS if budget == "full" else int(budget)
        attention.config = replace(DEFAULT, budget=tokens)
        quest[f"default, {budget}"] = timed(attention, profiled=budget in ("2048", "full"))
        attention.rewind()
    if context < DENSE_BELOW and "2048" in budgets:
        attention.config = replace(DEFAULT, dense_below=DENSE_BELOW)
        quest[f"default, 2048, dense below {DENSE_BELOW >> 10}K"] = timed(attention, profiled=False)
        attention.rewind()
    for budget in [budget for budget in budgets if budget in ALL_SPARSE]:
        attention.config = replace(DEFAULT, budget=int(budget), dense_layers=0)
        quest[f"no dense layers, {budget}"] = timed(attention, profiled=budget == "1024")
        attention.rewind()
    for budget in [budget for budget in budgets if budget in KEPT]:
        attention.config = replace(DEFAULT, budget=int(budget), dense_layers=0, reselect_every=KEPT_STEPS)
        name = f"no dense layers, {budget}, a selection for {KEPT_STEPS} steps"
        quest[name] = timed(attention, profiled=budget == "2048", period=KEPT_STEPS)
        attention.rewind()
    attention.config = replace(DEFAULT, dense_layers=shape.layers)
    dense[OWN_DENSE] = timed(attention)
    return {
        "name": str(row),
        "shape": asdict(shape),
        "weights": row.weights,
        "batch": batch,
        "context": context,
        "dense": dense,
        "fastest_dense": min(dense, key=lambda name: dense[name]["milliseconds"]["median"]),
        "quest": quest,
        "without_attention": without,
        "selections_differ": differs,
    }


def free_memory() -> None:
    """Give the memory of the last cache back, so that the next one finds a piece of its size."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure_all(rows: list[Row], options: argparse.Namespace, device: str) -> Iterator[dict[str, Any]]:
    """Results of the rows that fit, in an order that keeps a model's weights; a line for each of the others."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    timer = Timer(device, options.seconds)
    for (shape, weights), of_model in groupby(rows, key=lambda row: (row.shape, row.weights)):
        if weights == "int4" and (reason := has_int4(device)):
            print(f"{shape.name}: 4-bit weights are skipped, since torch has no product with them here: {reason}")
            continue
        model, without = None, {}
        for row in of_model:
            if device == "cuda":
                available = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
                if (needed := row.bytes_needed(dtype)) > available:
                    print(f"{row}: skipped, since it needs {needed / 1e9:.1f} GB of the {available / 1e9:.1f} GB here")
                    continue
            started = time.perf_counter()
            model = model or Model(shape, weights, dtype, device, options.compile, options.tune)
            try:
                if row.batch not in without:
                    nothing = Nothing(row.batch, row.context, device)
                    without[row.batch] = timer(lambda t, n=nothing, m=model: m.step(t, n), row.batch, True)
                result = measure(row, model, timer, options.budgets, without[row.batch])
            except torch.OutOfMemoryError as error:
                print(f"{row}: skipped, out of memory: {str(error).splitlines()[0]}")
                continue
            finally:
                free_memory()
            print(f"{line(result)} ({time.perf_counter() - started:.1f} s)", flush=True)
            yield result


def place(result: dict[str, Any]) -> tuple[str, str, int, int]:
    """The order of rows in the JSON."""
    return result["shape"]["name"], result["weights"], result["batch"], result["context"]


def line(result: dict[str, Any]) -> str:
    dense = result["dense"][result["fastest_dense"]]["milliseconds"]["median"]
    found = {name: entry["milliseconds"]["median"] for name, entry in result["quest"].items()}
    figures = ", ".join(f"{name} {ms:.2f} ({dense / ms:.2f}x)" for name, ms in found.items())
    return f"{result['name']}: {result['fastest_dense']} {dense:.2f} ms; {figures}"


def print_rows(rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row["quest"]))
    table = Table("model, weights, context, batch", "fastest dense", title="milliseconds a step, gain over dense")
    for name in (*names, "attention's share", "kernels"):
        table.add_column(name, justify="right")
    for row in rows:
        dense = row["dense"][row["fastest_dense"]]
        ms = dense["milliseconds"]["median"]
        cells = [f"{ms:.2f} ({row['fastest_dense']})"]
        for name in names:
            found = row["quest"][name]["milliseconds"]["median"] if name in row["quest"] else None
            cells.append(f"{found:.2f} ({ms / found:.2f}x)" if found else "-")
        paper = row["quest"][PAPER_NAME]
        cells.append(f"{dense['attention_share']:.0%} -> {paper['attention_share']:.0%}")
        cells.append(f"{dense.get('kernels', '-')} -> {paper.get('kernels', '-')}")
        table.add_row(row["name"], *cells)
    Console(width=200).print(table)


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    known = {shape.name: shape for shape in (LLAMA2_7B, LLAMA31_8B, QWEN3_8B)}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only the rows that have targets")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="only rows of this name, or with TEXT in it")
    parser.add_argument("--shapes", nargs="+", choices=known, default=[LLAMA2_7B.name, LLAMA31_8B.name])
    parser.add_argument("--budgets", nargs="+", default=BUDGETS[device], metavar="TOKENS", help='in tokens, or "full"')
    parser.add_argument("--seconds", type=float, default=0.2, help="of timed steps for a configuration (default: 0.2)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=device == "cuda")
    parser.add_argument("--tune", action="store_true", help="let Inductor tune its kernels: slower to start")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="keep the rows of an earlier JSON; measure those that it lacks, or those of --only",
    )
    parser.add_argument("--out", type=Path, default=default_path("end-to-end", device))
    options = parser.parse_args()
    if bad := [budget for budget in options.budgets if budget != "full" and not budget.isdecimal()]:
        parser.error(f'--budgets takes numbers of tokens or "full", got {bad[0]}')

    rows = SMALL if device == "cpu" else QUICK if options.quick else grid([known[name] for name in options.shapes])
    if options.only:
        try:
            wanted = named([str(row) for row in rows], options.only)
        except ValueError as error:
            parser.error(str(error))
        rows = [row for row in rows if str(row) in wanted]
    if device == "cpu":
        torch.set_num_threads(1)  # other programs then disturb it less
        print("torch sees no GPU: a tiny model on one CPU core, whose times say nothing of a real one's")

    result: dict[str, Any] = {"machine": machine(device), "tuned": options.tune, "rows": []}
    found: dict[str, dict[str, Any]] = {}
    if options.resume and options.out.exists():
        earlier = json.loads(options.out.read_text())
        if (earlier["machine"], earlier["tuned"]) != (result["machine"], result["tuned"]):
            parser.error(f"--resume: {options.out} has rows of another machine, of other versions or tuned otherwise")
        found = {row["name"]: row for row in earlier["rows"]}
        rows = rows if options.only else [row for row in rows if str(row) not in found]
    result["rows"] = [*found.values()]
    for row in measure_all(rows, options, device):
        found[row["name"]] = row
        result["rows"] = sorted(found.values(), key=place)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    if not found:
        raise SystemExit("no row was measured")
    print(json.dumps(result["machine"]))
    print_rows(result["rows"])
    print(f"written to {options.out}")
    if find_spec("matplotlib"):
        from end_to_end_plots import draw

        draw(result, options.out)


if __name__ == "__main__":
    main()
