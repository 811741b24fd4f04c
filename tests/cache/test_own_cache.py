"""The engine of docs/own_cache.md: dense at full budget, quest_attention's pages and bits at a smaller one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.attention_model import causal
from helpers.operator_cases import assert_same_bits
from quest_ops import PagedKVCache, QuestConfig, quest_attention, select_pages
from torch import Tensor

PAGE = Path(__file__).parents[2] / "docs" / "own_cache.md"
L, HQ, HKV, D, S = 2, 8, 2, 64, 16


@pytest.fixture(scope="module")
def engine_class() -> Any:
    (block,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(block, str(PAGE), "exec"), names)
    return names["Engine"]


class Pair:
    """The engine, a PagedKVCache taken through the same steps, and a record of all keys and values."""

    def __init__(self, engine: Any, device: str, num_pages: int) -> None:
        self.engine, self.device, self.num_pages, self.random = engine, device, num_pages, torch.Generator()
        sizes = {"max_tokens": engine.max_pages * S, "batch_size": 3, "page_size": S, "dtype": torch.float32}
        self.cache = PagedKVCache(L, HKV, D, **sizes, bounds="int8", device=device)
        self.config = QuestConfig(num_pages * S, S, dense_layers=0, bounds="int8")
        self.k = {name: torch.empty(L, 0, HKV, D, device=device) for name in "abc"}
        self.v = dict(self.k)

    def fork(self, source: str, target: str, tokens: int) -> None:
        self.engine.start(target, source, tokens)
        self.cache.fork("abc".index(source), "abc".index(target))
        self.cache.crop(tokens, "abc".index(target))
        for record in (self.k, self.v):
            record[target] = record[source][:, :tokens]

    def roll_back(self, name: str, tokens: int) -> None:
        self.engine.roll_back(name, tokens)
        self.cache.crop(tokens, "abc".index(name))
        for record in (self.k, self.v):
            record[name] = record[name][:, :tokens]

    def step(self, names: str, new: int) -> None:
        q, k, v = (
            torch.randn(L, len(names), new, heads, D, generator=self.random).to(self.device) for heads in (HQ, HKV, HKV)
        )
        rows = ["abc".index(name) for name in names]
        index = torch.tensor(rows, device=self.device)
        self.cache.advance(new, [new if name in names else 0 for name in "abc"])
        step = self.engine.step(list(names), new)
        for i, name in enumerate(names):
            self.k[name], self.v[name] = (
                torch.cat([record[name], x[:, i]], 1) for record, x in ((self.k, k), (self.v, v))
            )
        for layer in range(L):
            every_row = (q.new_zeros(3, new, *x.shape[3:]).index_copy(0, index, x[layer]) for x in (q, k, v))
            quest = quest_attention(*every_row, self.cache, layer, self.config)[rows]
            if new > 8:
                out = self.engine.prefill(layer, q[layer], k[layer], v[layer], step)
                torch.testing.assert_close(out, quest, rtol=1e-4, atol=1e-5)
            else:
                out, pages = self.engine.decode(layer, q[layer], k[layer], v[layer], step, self.num_pages)
                _, _, k_bounds, k_scales = self.cache.layer(layer)
                paging = (self.cache.page_table[rows], self.cache.seq_lens[rows])
                expected = select_pages(q[layer], k_bounds, *paging, self.config, k_scales=k_scales)
                assert torch.equal(pages, expected)
                if new == 1:
                    assert_same_bits(out, quest)
                torch.testing.assert_close(out, quest, rtol=1e-5, atol=1e-6)
            if new > 8 or self.num_pages == self.engine.max_pages:
                torch.testing.assert_close(out, self.dense(q[layer], layer, names), rtol=1e-4, atol=1e-5)

    def dense(self, q: Tensor, layer: int, names: str) -> Tensor:
        outs = []
        for i, name in enumerate(names):
            k, v = (x[name][layer].transpose(0, 1).repeat_interleave(HQ // HKV, 0) for x in (self.k, self.v))
            scores = q[i].transpose(0, 1) @ k.transpose(1, 2) * D**-0.5
            mask = causal(q.shape[1], k.shape[1]).to(self.device)
            outs.append((scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v).transpose(0, 1))
        return torch.stack(outs)


@pytest.mark.parametrize("num_pages", [4, 24])
def test_the_engine(device: str, engine_class: Any, num_pages: int) -> None:
    engine = engine_class(L, 60, HKV, D, S, max_pages=24, device=device)
    pair = Pair(engine, device, num_pages)
    engine.start("a")
    for chunk in (90, 41):  # a chunked prefill
        pair.step("a", chunk)
    pair.step("a", 1)
    pair.fork("a", "b", 120)  # a prefix that ends within a page
    pair.step("ab", 4)
    pair.fork("b", "c", 112)  # and one that ends with a page
    pair.step("c", 30)
    for accepted in (1, 3, 0):  # four tokens drafted, some rejected
        before = dict(engine.lengths)
        pair.step("abc", 4)
        for name in "abc":
            pair.roll_back(name, before[name] + accepted)
        pair.step("abc", 1)
    used = {page for table in engine.tables.values() for page in table}
    assert len(engine.free) == 60 - len(used)
    assert sum(map(len, engine.tables.values())) > len(used)  # some are shared
    for name in "abc":
        engine.roll_back(name, 0)
    assert sorted(engine.free) == list(range(60))
