"""The report of sparse and dense layers, against counts by hand."""

import re

import pytest
import torch
from quest_ops import PagedKVCache, QuestConfig, attention_report, quest_attention
from quest_ops.bounds import BoundsKind
from quest_ops.report import Counters

B, HKV, GROUP, D, S, L = 2, 2, 2, 64, 16, 3


def run(cache: PagedKVCache, config: QuestConfig, T: int, lens: list[int] | None = None) -> None:
    cache.advance(T, lens)
    for layer in range(L):
        q, k, v = (torch.randn(B, T, heads, D, device=cache.device) for heads in (HKV * GROUP, HKV, HKV))
        quest_attention(q, k, v, cache, layer, config)


def new_cache(device: str, max_tokens: int = 200, bounds: BoundsKind = "int4") -> PagedKVCache:
    sizes = {"max_tokens": max_tokens, "batch_size": B, "page_size": S}
    return PagedKVCache(L, HKV, D, **sizes, dtype=torch.float32, bounds=bounds, device=device)


@pytest.mark.parametrize("group_reduce", ["max", "none"])
@pytest.mark.parametrize(("kind", "bounds"), [("cache", 2 * D * 4), ("int8", 2 * D + 4), ("int4", D + 4)])
def test_counts(device: str, group_reduce: str, kind: BoundsKind, bounds: int) -> None:
    """bounds: their bytes a page and head."""
    cache = new_cache(device, bounds=kind)
    config = QuestConfig(48, S, dense_layers=1, group_reduce=group_reduce, bounds=kind)
    run(cache, config, 100, [100, 20])
    cache.start_report()
    run(cache, config, 9, [9, 9])  # 109 and 29 tokens: a prefill
    run(cache, config, 1)  # 110 and 30: 7 and 2 pages
    run(cache, config, 3)  # up to 113 and 33: 7, 7, 8 and 2, 2, 3 pages
    held = (7 + 2) + (7 + 7 + 8) + (2 + 2 + 3)
    read = (3 + 2) + (3 + 3 + 3) + (2 + 2 + 3)
    heads = HKV * GROUP if group_reduce == "none" else HKV
    page = 2 * S * D * 4
    dense, *sparse = attention_report(cache, config)
    assert (dense.plan.path, dense.plan.reason) == ("dense", "one of the first 1 layers")
    assert (dense.prefills, dense.steps, dense.pages_read, dense.pages_held) == (1, 2, held * HKV, held * HKV)
    assert dense.bytes_read == dense.bytes_dense == held * HKV * page
    for layer in sparse:
        assert (layer.plan.path, layer.plan.reason) == ("sparse", "at most 48 tokens of 200")
        assert (layer.prefills, layer.steps, layer.pages_read, layer.pages_held) == (1, 2, read * heads, held * heads)
        assert layer.bytes_read == read * heads * page + held * HKV * bounds
        assert layer.bytes_dense == dense.bytes_dense


def test_every_counter_has_a_name_and_a_description(device: str) -> None:
    cache = new_cache(device)
    cache.start_report()
    assert cache.counts._counts.shape == (L, len(Counters._fields))
    described = re.findall(r"^ {8}(\w+): ", Counters.__doc__, re.MULTILINE)
    assert tuple(described) == Counters._fields


def test_ragged_steps_and_padding(device: str) -> None:
    cache, config = new_cache(device), QuestConfig(32, S, sink_pages=0, dense_layers=0)
    cache.start_report()
    run(cache, config, 8, [8, 0])
    run(cache, config, 2, [2, 1])
    assert [x.pages_held for x in attention_report(cache, config)] == [(8 + 2 + 1) * HKV] * L


def test_what_fits_the_budget_is_dense_and_says_so(device: str) -> None:
    cache, config = new_cache(device, 40), QuestConfig(64, S, dense_layers=0)
    cache.start_report()
    run(cache, config, 1)
    assert {x.plan.reason for x in attention_report(cache, config)} == {"the budget of 64 tokens holds the cache's 40"}


def test_it_prints_as_a_table(device: str) -> None:
    cache, config = new_cache(device), QuestConfig(32, S, sink_pages=0, dense_layers=2)
    with pytest.raises(RuntimeError, match="call cache.start_report"):
        attention_report(cache, config)
    cache.start_report()
    run(cache, config, 50)
    run(cache, config, 1)
    head, *rows = str(attention_report(cache, config)).splitlines()
    assert head.split()[:3] == ["layer", "decodes", "prefills"]
    assert [row.split()[:4] for row in rows] == [[str(i), "dense", "1", "1"] for i in range(2)] + [
        ["2", "sparse", "1", "1"]
    ]
    cache.counts.reset()
    assert all(x.steps == x.pages_read == 0 and x.share == 1 for x in attention_report(cache, config))
    cache.stop_report()
    run(cache, config, 1)
    assert cache.counts is None


def test_counting_is_compiled(device: str) -> None:
    cache, config = new_cache(device), QuestConfig(32, S, sink_pages=0, dense_layers=1)
    run(cache, config, 60)
    cache.start_report()

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.stack([quest_attention(q, k, v, cache, layer, config) for layer in range(L)])

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        cache.advance(1)
        compiled(*(torch.randn(B, 1, heads, D, device=device) for heads in (HKV * GROUP, HKV, HKV)))
    dense, sparse, _ = attention_report(cache, config)
    assert (sparse.steps, sparse.pages_read, sparse.pages_held) == (2, 2 * B * 2 * HKV, 2 * B * 4 * HKV)
    assert dense.pages_read == dense.pages_held == sparse.pages_held
