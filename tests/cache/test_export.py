"""A decode step by torch.export with a dynamic batch, and as an AOTInductor package, equals eager mode."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoder_example import CONFIGS, SMALL, DecoderConfig, assert_same_cache, filled, make
from quest_ops import CacheView, PagedKVCache, QuestConfig
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram


class DecodeStep(nn.Module):
    """A step whose cache is the program's input tensors; all but the page table are written to."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        token: Tensor,
        k: Tensor,
        v: Tensor,
        bounds: Tensor,
        page_table: Tensor,
        lens: Tensor,
        scales: Tensor | None = None,
    ) -> Tensor:
        return self.model.step(token, CacheView(k, v, bounds, page_table, lens, scales))


def tensors(cache: PagedKVCache) -> tuple[Tensor, ...]:
    scales = () if cache.k_scales is None else (cache.k_scales,)
    return cache.k_cache, cache.v_cache, cache.k_bounds, cache.page_table, cache.seq_lens, *scales


def pooled(model: Any, batch: int, tokens: int = 100) -> tuple[PagedKVCache, Tensor]:
    """A prefilled cache with one pool size for every batch, since an exported program fixes it."""
    bounds = model.config.quest.bounds
    sizes = {"max_tokens": 256, "batch_size": batch, "num_pages": 64, "dtype": torch.float32, "bounds": bounds}
    make_cache = lambda *_: PagedKVCache(model.config.layers, 2, 64, device=model.output.weight.device, **sizes)  # noqa: E731
    model.new_cache, original = make_cache, model.new_cache
    try:
        return filled(model, batch, tokens)
    finally:
        model.new_cache = original


def exported(model: nn.Module) -> ExportedProgram:
    cache, token = pooled(model, 2)
    batch = {0: Dim("batch", min=1, max=64)}
    inputs = (token, *tensors(cache))
    shapes = (batch, None, None, None, batch, batch, None)[: len(inputs)]
    with torch.no_grad():
        return torch.export.export(DecodeStep(model), inputs, dynamic_shapes=shapes)


def assert_same_steps(model: Any, program: Any, batch: int, prompt: int = 100, tokens: int = 20) -> None:
    (expected, token), (actual, _) = (pooled(model, batch, prompt) for _ in range(2))
    for cache in (actual, expected):
        cache.reserve(tokens)  # in both, so that their pages are the same
    other = token
    with torch.no_grad():
        for _ in range(tokens):
            token, other = model.step(token, expected), program(other, *tensors(actual))
            assert torch.equal(token, other)
    assert actual.sync_lengths() == [prompt + tokens] * batch
    assert_same_cache(actual, expected)


@CONFIGS
def test_an_exported_step_writes_the_caches_it_is_given(device: str, config: DecoderConfig) -> None:
    model = make(device, config)
    program = exported(model)
    names = [str(node.target) for node in program.graph.nodes]
    assert [sum(op in name for name in names) for op in ("append_kv", "decode_step")] == [0, 2]
    functional = program.run_decompositions()
    scales = ["scales"] if config is SMALL else []
    assert list(functional.graph_signature.user_inputs_to_mutate.values()) == ["k", "v", "bounds", "lens", *scales]
    for step, batch in ((program.module(), 1), (program.module(), 3), (functional.module(), 4)):
        assert_same_steps(model, step, batch)


def test_an_exported_step_has_the_budget_of_each_layer(device: str) -> None:
    model = make(device, replace(SMALL, layers=4, quest=QuestConfig([48, 0, 64, 48], 16)))
    program = exported(model)
    steps = [node for node in program.graph.nodes if "decode_step" in str(node.target)]
    assert [step.args[9] for step in steps] == [3, 0, 4, 3]
    for batch in (1, 3):
        assert_same_steps(model, program.module(), batch)


def test_an_exported_step_reads_short_sequences_whole(device: str) -> None:
    """Prompts of 100 tokens, which cross the limit, with the tokens of eager mode."""
    model = make(device, replace(SMALL, quest=replace(SMALL.quest, dense_below=110)))
    program = exported(model)
    steps = [node for node in program.graph.nodes if "decode_step" in str(node.target)]
    assert [step.args[9] for step in steps] == [0, SMALL.quest.num_pages]
    assert [step.args[-1] for step in steps][1:] == [110]
    for batch in (1, 3):
        assert_same_steps(model, program.module(), batch)


@CONFIGS
def test_an_exported_step_survives_a_file(device: str, tmp_path: Path, config: DecoderConfig) -> None:
    model = make(device, config)
    torch.export.save(exported(model), tmp_path / "step.pt2")
    assert_same_steps(model, torch.export.load(tmp_path / "step.pt2").module(), 3, prompt=10, tokens=30)


@pytest.mark.slow
@pytest.mark.usefixtures("aotinductor")
@CONFIGS
def test_an_aotinductor_package(device: str, tmp_path: Path, config: DecoderConfig) -> None:
    """Compiled ahead of time, saved, loaded and run from Python, which must have imported quest_ops."""
    model = make(device, config)
    path = torch._inductor.aoti_compile_and_package(exported(model), package_path=str(tmp_path / "step.pt2"))
    step = torch._inductor.aoti_load_package(path)
    for batch in (2, 1, 5):
        assert_same_steps(model, step, batch)


@pytest.mark.parametrize("strict", [False, True], ids=["non_strict", "strict"])
def test_a_symbolic_number_of_pages_is_refused(device: str, strict: bool) -> None:
    """A layer's place in the pool depends on it, and its operators make it static."""
    model = make(device)
    cache, token = pooled(model, 2)
    pages = {1: Dim("pages", min=2)}
    shapes = (None, pages, pages, pages, None, None, pages)
    refused = (ValueError, torch._dynamo.exc.UserError)
    with torch.no_grad(), pytest.raises(refused, match="(?s)pages.*(static|speciali[sz]ed).*64"):
        torch.export.export(DecodeStep(model), (token, *tensors(cache)), dynamic_shapes=shapes, strict=strict)


def test_a_view_runs_in_eager_mode_and_keeps_no_account(device: str) -> None:
    model = make(device)
    assert_same_steps(model, DecodeStep(model), 2)
    view = CacheView(*tensors(pooled(model, 1)[0]))
    for call in (
        lambda: view.lengths,
        lambda: view.free_pages,
        lambda: view.reserve(1),
        lambda: view.crop(1),
        view.sync_lengths,
        view.reset,
    ):
        with pytest.raises(RuntimeError, match="a CacheView keeps no account of pages and lengths"):
            call()
