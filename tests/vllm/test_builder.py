"""The builder of a step's metadata and the layers that read it, on mocked metadata. CUDA and CPU share this code.

The mocked base classes stand for vLLM's own backend of a platform. Its prefill is the reference's dense attention.
"""
# ruff: noqa: ARG002, ARG005 - the mocks have vLLM's signatures

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm.config", reason="vLLM is not installed: `make test-vllm` runs this")

from quest_ops import QuestConfig, reference
from quest_ops.vllm import backend, worker
from quest_ops.vllm.settings import Settings
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata

Hq, Hkv, S, D, BLOCKS, MOST = 4, 2, 16, 64, 64, 8
SETTINGS = Settings.of({"budget": 64, "dense_layers": 0}, S, 1)


@dataclass
class OwnMetadata:
    common: CommonAttentionMetadata
    slot_mapping: torch.Tensor


class OwnBuilder:
    reorder_batch_threshold = None

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        self.kv_cache_spec, self.vllm_config, self.device = kv_cache_spec, vllm_config, device

    def _init_reorder_batch_threshold(self, threshold: int, supports_spec_as_decode: bool) -> None:
        assert supports_spec_as_decode

    def build(self, common_prefix_len: int, common: Any, fast_build: bool = False) -> OwnMetadata:
        return OwnMetadata(common, common.slot_mapping)

    def build_for_cudagraph_capture(self, common: Any) -> Any:
        return self.build(0, common)


class OwnImpl:
    """Writes and reads the cache as FlashAttention does: [N, S, Hkv, 2 * D] under vLLM's view [N, Hkv, S, 2 * D]."""

    def __init__(self) -> None:
        self.num_kv_heads, self.head_size, self.scale = Hkv, D, D**-0.5

    def do_kv_cache_update(self, layer: Any, key: Any, value: Any, kv_cache: Any, slot_mapping: Any) -> None:
        kv_cache[slot_mapping // S, :, slot_mapping % S] = torch.cat([key, value], -1)

    def forward(self, layer: Any, q: Any, k: Any, v: Any, kv_cache: Any, metadata: Any, out: Any, *scales: Any) -> Any:
        common = metadata.common
        for r in range(common.num_reqs):
            a, b = common.query_start_loc_cpu[r : r + 2].tolist()
            table, lens = common.block_table_tensor[r : r + 1], common.seq_lens[r : r + 1]
            caches = [x.contiguous() for x in kv_cache.split(D, -1)]
            for t in range(a, b):
                seen = lens - (b - 1 - t)
                out[t] = reference.sparse_decode(q[t][None], *caches, table, seen, None, self.scale)[0][0]
        return out


class Builder(backend.QuestBuilder, OwnBuilder):
    pass


class Impl(backend.QuestImpl, OwnImpl):
    pass


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> Builder:
    monkeypatch.setattr(backend, "settings_of", lambda config: SETTINGS)
    monkeypatch.setattr(backend.QuestBuilder, "_plan", lambda self, settings, names: True)
    compilation = SimpleNamespace(max_cudagraph_capture_size=None)
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=MOST), compilation_config=compilation)
    return Builder(SimpleNamespace(block_size=S), ["layers.0"], config, torch.device("cpu"))


@pytest.fixture
def impl(monkeypatch: pytest.MonkeyPatch) -> Impl:
    monkeypatch.setattr(backend, "get_current_vllm_config_or_none", lambda: None)
    impl = Impl()
    impl.quest = backend.SparseLayer(0, SETTINGS.config.at(0), None)
    return impl


def new_cache() -> torch.Tensor:
    """[N, Hkv, S, 2 * D] of NHD blocks with room for bounds, NaN all over."""
    block = S * Hkv * 2 * D
    tail = backend.padded_spec(Spec(block * 4), "int4").page_size_padded // 4
    raw = torch.full((BLOCKS * tail,), torch.nan)
    return torch.as_strided(raw, (BLOCKS, Hkv, S, 2 * D), (tail, 2 * D, Hkv * 2 * D, 1))


@dataclass
class Spec:
    unpadded_page_size_bytes: int
    num_kv_heads: int = Hkv
    head_size: int = D
    dtype: torch.dtype = torch.float32
    page_size_padded: int = 0


class Runner:
    """vLLM's persistent tensors, as its model runner fills them before each step."""

    def __init__(self) -> None:
        self.query_start_loc = torch.zeros(MOST + 1, dtype=torch.int32)
        self.seq_lens = torch.zeros(MOST, dtype=torch.int32)
        self.block_table = torch.full((MOST, 8), -(2**31), dtype=torch.int32)
        self.slot_mapping = torch.full((512,), -1, dtype=torch.int64)
        free = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(0)).int()
        self.tables = free[: MOST * 8].view(MOST, 8)

    def step(self, requests: list[int], lens: list[int], new: list[int], padded: int | None = None) -> Any:
        """A step of some requests with ``new`` tokens each, after which they have ``lens``."""
        B = padded or len(requests)
        offsets = torch.tensor([0, *new]).cumsum(0).int()
        self.query_start_loc.fill_(offsets[-1])
        self.query_start_loc[: len(offsets)] = offsets
        self.seq_lens.zero_()
        self.seq_lens[: len(lens)] = torch.tensor(lens)
        self.slot_mapping.fill_(-1)
        for row, (request, end, n) in enumerate(zip(requests, lens, new, strict=True)):
            self.block_table[row] = self.tables[request]
            position = torch.arange(end - n, end)
            slots = self.tables[request][position // S].long() * S + position % S
            self.slot_mapping[int(offsets[row]) : int(offsets[row + 1])] = slots
        tokens = int(offsets[-1]) if padded is None else padded * max(new)
        return CommonAttentionMetadata(
            query_start_loc=self.query_start_loc[: B + 1], query_start_loc_cpu=self.query_start_loc[: B + 1].clone(),
            seq_lens=self.seq_lens[:B], num_reqs=B, num_actual_tokens=tokens, max_query_len=max(new), max_seq_len=128,
            block_table_tensor=self.block_table[:B], slot_mapping=self.slot_mapping[:tokens],
            seq_lens_cpu_upper_bound=self.seq_lens[:B].clone(),
        )  # fmt: skip


def inputs(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(tokens, heads, D, generator=generator) for heads in (Hq, Hkv, Hkv))


def prompts(monkeypatch: pytest.MonkeyPatch, lens: list[int]) -> None:
    monkeypatch.setattr(backend, "prompt_lens", lambda count: torch.tensor(lens[:count]).numpy())


def run(impl: Impl, metadata: Any, cache: torch.Tensor, seed: int) -> torch.Tensor:
    tokens = metadata.common.num_actual_tokens
    q, k, v = inputs(tokens, seed)
    out = torch.full((tokens, Hq, D), torch.nan)
    impl.do_kv_cache_update(None, k, v, cache, metadata.slot_mapping)
    return impl.forward(None, q, k, v, cache, metadata, out)


def test_a_mixed_step_is_each_request_alone(builder: Builder, impl: Impl, monkeypatch: pytest.MonkeyPatch) -> None:
    lens = [0] * 5
    prompt_lens = [90, 30, 75, 60, 40]
    cache, runner = new_cache(), Runner()
    alone = [new_cache() for _ in lens]
    # Each request's new tokens in each step: chunks of prompts, decoding, and one chunk with both (request 3).
    for seed, new in enumerate([[80, 30, 60, 50, 40], [10, 1, 15, 20, 1], [1, 5, 1, 12, 1], [1, 1, 1, 1, 8]]):
        lens = [a + b for a, b in zip(lens, new, strict=True)]
        prompts(monkeypatch, prompt_lens)
        together = run(impl, builder.build(0, runner.step([0, 1, 2, 3, 4], lens, new)), cache, seed)
        q, k, v = inputs(sum(new), seed)
        first = 0
        for request, n in enumerate(new):
            prompts(monkeypatch, prompt_lens[request : request + 1])
            part = slice(first, first + n)
            metadata = builder.build(0, runner.step([request], lens[request : request + 1], [n]))
            out = torch.full((n, Hq, D), torch.nan)
            impl.forward(None, q[part], k[part], v[part], alone[request], metadata, out)
            assert torch.equal(together[part], out)
            first += n


def test_a_captured_step_replays_as_a_fresh_one(builder: Builder, impl: Impl, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA graph replays the tensors of its capture. Here the captured metadata takes their place."""
    runner, caches = Runner(), [new_cache(), new_cache()]
    for cache in caches:
        prompts(monkeypatch, [70, 33, 50])
        run(impl, builder.build(0, runner.step([0, 1, 2], [70, 33, 50], [70, 33, 50])), cache, 0)
    captured = builder.build_for_cudagraph_capture(runner.step([0, 1, 2, 3], [1] * 4, [1] * 4, padded=4))
    lens = [70, 33, 50]
    for step, requests in enumerate([[0, 1, 2], [2, 0], [1], [0, 1, 2]]):  # fewer requests: the others are idle
        for request in requests:
            lens[request] += 1
        prompts(monkeypatch, [5] * 4)
        common = runner.step(requests, [lens[r] for r in requests], [1] * len(requests), padded=4)
        fresh = builder.build(0, common)
        q, k, v = inputs(4, step)
        outs = []
        for metadata, cache in zip((captured, fresh), caches, strict=True):
            outs.append(torch.full((4, Hq, D), torch.nan))
            impl.forward(None, q, k, v, cache, metadata, outs[-1])
        assert torch.equal(*outs)
        assert not outs[0][len(requests) :].any()
        assert torch.equal(*(torch.nan_to_num(cache) for cache in caches))
    assert captured.quest.sparse.seq_lens.data_ptr() == runner.seq_lens.data_ptr()
    assert captured.quest.sparse.page_table.data_ptr() == runner.block_table.data_ptr()


@pytest.mark.parametrize("new", [[1, 1, 1], [4, 4, 4], [3, 1, 4], [30, 1, 2]])
def test_building_reads_nothing_of_the_device(
    builder: Builder, monkeypatch: pytest.MonkeyPatch, new: list[int]
) -> None:
    """On the meta device no value exists: a read by the host is an error."""
    common = Runner().step([0, 1, 2], [40, 41, 42], new)
    on_device = {
        name: getattr(common, name).to("meta")
        for name in ("query_start_loc", "seq_lens", "block_table_tensor", "slot_mapping")
    }
    builder._start_lens = builder._start_lens.to("meta")
    prompts(monkeypatch, [20, 35, 36])
    step = builder.build(0, common.replace(**on_device)).quest
    assert step.sparse is not None
    assert step.sparse.page_table.device.type == "meta"
    assert (step.dense is not None) == (new[0] > 20)


def test_the_cuda_backend_asks_for_graphs_of_decode_steps() -> None:
    from quest_ops.vllm.cuda import CUDAQuestBackend, CUDAQuestBuilder, CUDAQuestImpl

    assert CUDAQuestBuilder.get_cudagraph_support(None, None) == AttentionCGSupport.UNIFORM_BATCH
    assert not CUDAQuestBuilder.supports_update_block_table
    assert CUDAQuestBackend.get_builder_cls() is CUDAQuestBuilder
    assert CUDAQuestBackend.get_impl_cls() is CUDAQuestImpl
    assert CUDAQuestBackend.get_name() == "FLASH_ATTN"
    assert not CUDAQuestBackend.is_sparse()
    assert all(layout.is_block_compact for layout in CUDAQuestBackend.supported_kv_cache_layouts())
    assert not CUDAQuestImpl.__abstractmethods__


def test_reasons_to_leave_a_layer_to_vllm() -> None:
    config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=4096))
    settings = Settings.of({"budget": [0, 64, 64, 4096]}, S, 4)

    def reason(name: str, impl: dict[str, Any] | None = None, shared: set[str] | None = None, **layer: Any) -> Any:
        defaults = {"attn_type": "decoder", "sliding_window": None, "head_size": 64, "head_size_v": 64}
        fields = {**defaults, "kv_sharing_target_layer_name": None, **layer}
        attention = SimpleNamespace(impl=SimpleNamespace(**(impl or {})), **fields)
        return backend.why_dense(name, attention, config, settings, shared or set())

    assert reason("model.layers.1.self_attn") is None
    assert reason("model.layers.0.self_attn") == "a budget of 0"
    assert reason("model.layers.3.self_attn") == "the budget of 4096 tokens holds the engine's 4096"
    assert reason("model.layers.4.self_attn") == "a layer of the draft model"
    assert reason("draft_model.layers.1.self_attn") == "a layer of the draft model"
    assert reason("layers.1", sliding_window=128) == "a window of 128 tokens"
    assert reason("layers.1", attn_type="encoder") == "encoder attention"
    assert reason("layers.1", {"logits_soft_cap": 30.0}) == "logit soft-capping"
    assert reason("layers.1", {"sinks": torch.zeros(4)}) == "attention sinks"
    assert reason("layers.1", {"alibi_slopes": torch.zeros(4)}) == "ALiBi"
    assert reason("layers.1", head_size=512, head_size_v=512) == "head_dim 512"
    assert reason("layers.1", kv_sharing_target_layer_name="layers.0") == "a cache shared between layers"
    assert reason("layers.1", shared={"layers.1"}) == "a cache shared between layers"


def test_one_line_for_the_log() -> None:
    plans = [backend.LayerPlan(i, *("dense", "first") if i < 2 else ("sparse", "at most 64")) for i in range(6)]
    spec = SimpleNamespace(**vars(Spec(8192)), block_size=16, page_size_bytes=8704)
    line = backend.describe(plans, spec, SETTINGS)
    assert line == (
        "Quest: layers 2-5 read at most 64; layers 0-1 are dense: first. Pages are the blocks of 16 tokens. "
        "Bounds (int4) take 136 bytes of each block of 8704, beside 8192 of keys and values."
    )
    assert worker.prompt_lens(3) is None
    assert QuestConfig().bounds == "int4"
