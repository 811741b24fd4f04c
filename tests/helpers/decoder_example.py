"""The example's decoder, small, with prompts and filled caches."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quest_ops import PagedKVCache, QuestConfig
from torch import Tensor

__all__ = [
    "CONFIGS",
    "DENSE",
    "SMALL",
    "Decoder",
    "DecoderConfig",
    "assert_same_cache",
    "decoder",
    "filled",
    "generate",
    "make",
    "prefill",
    "prompts",
]

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import decoder
from decoder import Decoder, DecoderConfig, generate, prefill

# The budget is two pages; every prompt here is longer.
SMALL = DecoderConfig(64, 64, 2, 4, 2, 64, 96, quest=QuestConfig(32, 16, sink_pages=0, dense_layers=1))
WIDE_BOUNDS = replace(SMALL, quest=replace(SMALL.quest, bounds="cache"))
CONFIGS = pytest.mark.parametrize("config", [WIDE_BOUNDS, SMALL], ids=["cache", "int4"])
DENSE = replace(SMALL, quest=QuestConfig(1024, 16))


def make(device: str, config: DecoderConfig = SMALL) -> Decoder:
    torch.manual_seed(0)
    return Decoder(config).to(device)


def prompts(device: str, batch: int, tokens: int) -> Tensor:
    return torch.randint(64, (batch, tokens), generator=torch.Generator().manual_seed(tokens)).to(device)


def filled(model: Decoder, batch: int, tokens: int = 100, capacity: int = 256) -> tuple[PagedKVCache, Tensor]:
    """A zeroed cache with a prefilled prompt, and the token that follows it."""
    cache = model.new_cache(batch, capacity)
    for pool in cache.pools:
        pool.zero_()
    return cache, prefill(model, prompts(model.output.weight.device, batch, tokens), cache)


def assert_same_cache(actual: PagedKVCache, expected: PagedKVCache) -> None:
    assert actual.seq_lens.tolist() == expected.seq_lens.tolist()
    for a, b in zip(actual.pools, expected.pools, strict=True):
        # A byte of the bounds may round to its neighbour.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 if a.is_floating_point() else 1)
