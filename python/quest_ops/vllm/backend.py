"""The attention backend: Quest on the sparse layers, and vLLM's own backend for all else.

The classes here are mixed into vLLM's own of a platform, see ``cpu`` and ``cuda``. A layer without a
:class:`SparseLayer` runs vLLM's code unchanged. A sparse layer keeps keys and values in vLLM's cache, and page bounds
behind each block.

A step that only decodes is one :func:`quest_ops.decode_step` a layer: it writes the new keys and values, renews the
bounds, selects and attends. Its tensors are vLLM's persistent ones, so it can be captured in a CUDA graph. In a step
with prompt tokens, these are attended for by vLLM's own kernel.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config_or_none, get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata, MultipleOf

from ..bounds import bytes_of_bounds
from ..config import QuestConfig
from ..ops import HEAD_DIMS, decode_step, estimate, sparse_decode, topk_pages, update_bounds
from ..report import AttentionCounts, LayerPlan
from .block_tail import bounds_in_blocks, padded_spec
from .settings import RefusedError, Settings
from .step import DenseRows, Rows, Step, count_sparse, dense_tokens, send, sparse_rows
from .worker import prompt_lens

logger = init_logger("vllm.quest_ops")


def settings_of(vllm_config: VllmConfig | None) -> Settings | None:
    """The settings that the plugin left in the engine's configuration, or None where Quest is off."""
    additional = getattr(vllm_config, "additional_config", None)
    keys = additional.get("quest") if isinstance(additional, dict) else None
    if vllm_config is None or not keys:
        return None
    num_layers = vllm_config.model_config.get_total_num_hidden_layers()
    return Settings.of(keys, vllm_config.cache_config.block_size, num_layers)


@dataclass(frozen=True)
class SparseLayer:
    """What a layer's attention needs to run sparse.

    Attributes:
        index: of the layer in the model.
        config: of the selection in this layer.
        counts: its counters, or None where nothing is counted.
    """

    index: int
    config: QuestConfig
    counts: AttentionCounts | None


class QuestBackend:
    """Mixin of an ``AttentionBackend``: room for bounds in each block."""

    # A step that only decodes writes keys and values itself.
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:  # noqa: ARG004 - vLLM's
        return [MultipleOf(16)]

    @classmethod
    def customize_spec(cls, spec: Any) -> Any:
        """A layer's cache with room for bounds: the answer from which vLLM makes its memory profile.

        All layers of a group must have the same blocks, so dense layers get the room too.
        """
        spec = super().customize_spec(spec)  # type: ignore[misc]
        settings = settings_of(get_current_vllm_config_or_none()) or _settings.get("current")
        return spec if settings is None else padded_spec(spec, settings.config.bounds)


# vLLM does not set its current configuration while it asks for the layers' caches. Layers are made before, in the same
# process, with it set.
_settings: dict[str, Settings | None] = {}


class QuestBuilder:
    """Mixin of an ``AttentionMetadataBuilder``: vLLM's own metadata, with a :class:`Step` as its ``quest``."""

    supports_update_block_table = False  # a step has block tables of its own
    _only_decodes = False
    kv_cache_spec: Any
    vllm_config: VllmConfig
    device: torch.device

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)  # type: ignore[call-arg]
        self._settings = settings_of(vllm_config)
        self._sparse = self._settings is not None and self._plan(self._settings, layer_names)
        if not self._sparse:
            return
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)  # type: ignore[attr-defined]
        # A graph's replay reads them at this address. Its batch may have more rows than there are requests.
        captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        rows = max(vllm_config.scheduler_config.max_num_seqs, captured)
        self._start_lens = torch.zeros(rows, dtype=torch.int32, device=device)
        self._reported = time.monotonic()

    def _plan(self, settings: Settings, layer_names: list[str]) -> bool:
        """Tell each layer whether it is sparse, log it, and return whether any is."""
        config, S, counts = self.vllm_config, self.kv_cache_spec.block_size, None
        layers = get_layers_from_vllm_config(config, Attention, layer_names)
        shared = {layer.kv_sharing_target_layer_name for layer in layers.values()}
        plans = []
        for name, layer in layers.items():
            reason = why_dense(name, layer, config, settings, shared)
            if reason is None and settings.config.page_size != S:
                raise RefusedError(
                    f"quest_ops: the engine made blocks of {S} tokens, and the settings are for "
                    f"{settings.config.page_size}: start it with --block-size {settings.config.page_size}"
                )
            index = extract_layer_index(name)
            if reason is None and settings.report is not None and counts is None:
                shape = (len(settings.budgets), layer.num_kv_heads, layer.head_size, S)
                counts = AttentionCounts(*shape, self.kv_cache_spec.dtype, self.device, settings.config.bounds)
            if reason is None:
                budget = settings.budgets[index]
                layer.impl.quest = SparseLayer(index, settings.config.at(index), counts)
                plans.append(
                    LayerPlan(index, "sparse", f"at most {budget} tokens of {config.model_config.max_model_len}")
                )
            else:
                plans.append(LayerPlan(index, "dense", reason))
            layer.impl.quest_plan = plans[-1]
        logger.info_once("%s", describe(plans, self.kv_cache_spec, settings))
        return any(plan.path == "sparse" for plan in plans)

    def build(self, common_prefix_len: int, common: CommonAttentionMetadata, fast_build: bool = False) -> Any:
        metadata = super().build(common_prefix_len, common, fast_build)  # type: ignore[misc]
        metadata.quest = self._step(common) if self._sparse else None
        self._log_report()
        return metadata

    def build_for_cudagraph_capture(self, common: CommonAttentionMetadata) -> Any:
        """A step that only decodes: graphs are captured for no other, and a capture has no real requests."""
        self._only_decodes = True
        try:
            return super().build_for_cudagraph_capture(common)  # type: ignore[misc]
        finally:
            self._only_decodes = False

    def _step(self, common: CommonAttentionMetadata) -> Step:
        offsets = common.query_start_loc_cpu.numpy()
        query_lens = offsets[1:] - offsets[:-1]
        B = len(query_lens)
        start_lens = self._start_lens[:B]
        seq_lens, page_table = common.seq_lens[:B], common.block_table_tensor[:B]
        torch.sub(seq_lens, common.query_start_loc[1 : B + 1] - common.query_start_loc[:B], out=start_lens)
        bound = _of_host(common.seq_lens_cpu_upper_bound, B)
        if self._only_decodes:
            num_sparse = query_lens
        else:
            num_sparse = count_sparse(query_lens, bound, prompt_lens(B), _of_host(common.is_prefilling, B))
        rows = sparse_rows(query_lens, num_sparse, page_table, start_lens, seq_lens)
        dense = self._dense(common, query_lens, num_sparse, bound) if (num_sparse < query_lens).any() else None
        return Step(page_table, start_lens, seq_lens, int(offsets[-1]), rows, dense)

    def _dense(
        self, common: CommonAttentionMetadata, query_lens: np.ndarray, num_sparse: np.ndarray, bound: np.ndarray | None
    ) -> DenseRows:
        """The step's prompt tokens as a step of their own, for vLLM's kernel."""
        requests, tokens = dense_tokens(query_lens, num_sparse)
        device, new = common.seq_lens.device, (query_lens - num_sparse)[requests]
        index = send(requests, device)
        offsets = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
        behind = send(num_sparse[requests].astype(np.int32), device)
        part = common.replace(
            query_start_loc=send(offsets, device),
            query_start_loc_cpu=torch.from_numpy(offsets),
            seq_lens=common.seq_lens.index_select(0, index) - behind,
            num_reqs=len(requests),
            num_actual_tokens=int(offsets[-1]),
            max_query_len=int(new.max()),
            max_seq_len=common.max_seq_len if bound is None else int((bound - num_sparse)[requests].max()),
            block_table_tensor=common.block_table_tensor.index_select(0, index),
            slot_mapping=common.slot_mapping[: int(offsets[-1])],  # nothing is written by it
            seq_lens_cpu_upper_bound=None,
            is_prefilling=None,
            positions=None,
            _num_computed_tokens_cache=None,
            _token_to_req_indices_cache=None,
        )
        # A fast build leaves alone the buffers that the whole step's metadata is in.
        metadata = super().build(0, part, fast_build=True)  # type: ignore[misc]
        return DenseRows(tokens if isinstance(tokens, slice) else send(tokens, device), metadata)

    def _log_report(self) -> None:
        seconds = self._settings.report if self._settings is not None and self._sparse else None
        if seconds and time.monotonic() - self._reported >= seconds:
            self._reported = time.monotonic()
            from .worker import report_of

            logger.info("Quest: pages read, by layer\n%s", report_of(self.vllm_config))


class QuestImpl:
    """Mixin of an ``AttentionImpl``.

    Attributes:
        quest: None in a dense layer. The builder sets it, before the first step.
        quest_plan: how the layer decodes, and why.
    """

    quest: SparseLayer | None = None
    quest_plan: LayerPlan | None = None
    _bounds: tuple[Tensor, Tensor, Tensor | None] | None = None
    num_kv_heads: int
    head_size: int
    scale: float

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = get_current_vllm_config_or_none()
        if config is not None and config.model_config.runner_type != "draft":
            _settings["current"] = settings_of(config)

    # Fused kernels of vLLM write the cache before the step is known to be one that writes it.
    def fused_rope_kvcache_supported(self) -> bool:
        return False

    def fused_qk_norm_rope_kvcache_supported(self) -> bool:
        return False

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        if self.quest is None:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)  # type: ignore[misc]

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """A layer of a step, as vLLM calls it.

        Args:
            layer: vLLM's layer.
            query, output: [tokens, Hq, D]; ``output`` is written.
            key, value: [tokens, Hkv, D].
            kv_cache: [N, Hkv, S, 2 * D], with bounds behind each block.
            attn_metadata: of the builder; None in vLLM's profiling run.
            output_scale, output_block_scale: as in vLLM, whose backends refuse them.
        """
        if self.quest is None or attn_metadata is None:
            scales = (output_scale, output_block_scale)
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *scales)  # type: ignore[misc]
        step: Step = attn_metadata.quest
        k_cache, v_cache = kv_cache.split(self.head_size, -1)
        k_bounds, k_scales = self._bounds_of(kv_cache)
        if step.dense is None:
            if step.sparse is not None:
                self._decode(step.sparse, query, key, value, (k_cache, v_cache, k_bounds), k_scales, output)
            return output
        n = step.num_tokens
        self._write(layer, key[:n], value[:n], kv_cache, attn_metadata.slot_mapping[:n])
        lens = (step.seq_lens, step.start_lens)
        update_bounds(k_cache, k_bounds, step.page_table, *lens, k_scales, self.quest.config.std_factor)
        if step.sparse is not None:
            self._select_and_attend(step.sparse, query, (k_cache, v_cache, k_bounds), k_scales, output)
        self._attend_densely(layer, step.dense, query, key, value, kv_cache, output)
        return output

    def _decode(
        self, rows: Rows, query: Tensor, key: Tensor, value: Tensor, caches: tuple[Tensor, Tensor, Tensor],
        k_scales: Tensor | None, output: Tensor,
    ) -> None:  # fmt: skip
        """A step without prompt tokens, whole: written and attended for."""
        assert self.quest is not None
        num_pages, group_reduce, sink_pages, recent_pages = self.quest.config.selection
        out, _, pages = decode_step(
            rows.pack(query),
            rows.pack(key),
            rows.pack(value),
            *caches,
            rows.page_table,
            rows.start_lens,
            rows.seq_lens,
            num_pages,
            group_reduce,
            sink_pages,
            recent_pages,
            self.scale,
            k_scales,
            rows.new_lens,
            std_factor=self.quest.config.std_factor,
            dense_below=self.quest.config.dense_below,
        )
        rows.unpack(out, output)
        self._count(rows, pages)

    def _select_and_attend(
        self, rows: Rows, query: Tensor, caches: tuple[Tensor, Tensor, Tensor], k_scales: Tensor | None, output: Tensor
    ) -> None:
        """The generated tokens of a step with prompt tokens. Keys, values and bounds are written."""
        assert self.quest is not None
        k_cache, v_cache, k_bounds = caches
        S, Hkv = k_cache.shape[2], k_cache.shape[1]
        num_pages, group_reduce, sink_pages, recent_pages = self.quest.config.selection
        q, table, lens = rows.pack(query), rows.page_table, rows.seq_lens
        scores = estimate(q, k_bounds, table, lens, S, k_scales, rows.new_lens)
        how = (group_reduce, sink_pages, recent_pages, self.scale, rows.new_lens)
        pages = topk_pages(scores, lens, S, num_pages, Hkv, *how, dense_below=self.quest.config.dense_below)
        out, _ = sparse_decode(q, k_cache, v_cache, table, lens, pages, self.scale, rows.new_lens)
        rows.unpack(out, output)
        self._count(rows, pages)

    def _attend_densely(
        self, layer: Any, dense: DenseRows, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, output: Tensor
    ) -> None:
        """The prompt tokens of a step, by vLLM's kernel."""
        assert self.quest is not None
        q, k, v, out = (x[dense.tokens] for x in (query, key, value, output))
        cache, metadata = self._for_own_kernel(layer, kv_cache, dense.metadata)
        super().forward(layer, q, k, v, cache, metadata, out)  # type: ignore[misc]
        if isinstance(dense.tokens, Tensor):
            output.index_copy_(0, dense.tokens, out)
        if self.quest.counts is not None:
            self.quest.counts.record_prefill(self.quest.index)

    def _write(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        """Store new keys and values as the operators read them: [N, Hkv, S, D] of keys, beside that of values."""
        super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)  # type: ignore[misc]

    def _for_own_kernel(self, layer: Any, kv_cache: Tensor, metadata: Any) -> tuple[Tensor, Any]:  # noqa: ARG002
        """The cache and metadata of prompt tokens, as vLLM's kernel of this platform reads them."""
        return kv_cache, metadata

    def _bounds_of(self, kv_cache: Tensor) -> tuple[Tensor, Tensor | None]:
        assert self.quest is not None
        if self._bounds is None or self._bounds[0] is not kv_cache:
            self._bounds = (kv_cache, *bounds_in_blocks(kv_cache, self.quest.config.bounds))
        return self._bounds[1:]

    def _count(self, rows: Rows, pages: Tensor) -> None:
        assert self.quest is not None
        if self.quest.counts is not None:
            self.quest.counts.record(self.quest.index, pages.flatten(0, 1), rows.token_lens(), 1)


def _of_host(tensor: Tensor | None, rows: int) -> np.ndarray | None:
    """[rows] of a host's tensor, which may lack the idle rows of a graph; None where it is None."""
    if tensor is None:
        return None
    found = tensor.numpy()[:rows]
    return np.pad(found, (0, rows - len(found)))


def why_dense(
    name: str, layer: Any, vllm_config: VllmConfig, settings: Settings, shared: set[str | None]
) -> str | None:
    """The reason for which a layer is left to vLLM's own backend, or None for a sparse layer.

    Args:
        name: of the layer in the engine.
        layer: vLLM's ``Attention``.
        vllm_config: of the engine.
        settings: of Quest.
        shared: names of the layers whose cache another layer reads.
    """
    impl, index = layer.impl, extract_layer_index(name)
    if index >= len(settings.budgets) or name.startswith("draft"):
        return "a layer of the draft model"
    if layer.attn_type != AttentionType.DECODER:
        return f"{layer.attn_type} attention"
    if layer.sliding_window is not None:
        return f"a window of {layer.sliding_window} tokens"
    features = {
        "logit soft-capping": getattr(impl, "logits_soft_cap", None),
        "ALiBi": getattr(impl, "alibi_slopes", None) is not None,
        "attention sinks": getattr(impl, "sinks", None) is not None,
        "a cache shared between layers": layer.kv_sharing_target_layer_name or name in shared,
        f"head_dim {layer.head_size}": layer.head_size not in HEAD_DIMS or layer.head_size_v != layer.head_size,
    }
    for feature, present in features.items():
        if present:
            return feature
    if settings.config.is_dense(index):
        if settings.budgets[index] == 0:
            return "a budget of 0"
        return f"one of the first {settings.config.dense_layers} layers"
    budget, longest = settings.budgets[index], vllm_config.model_config.max_model_len
    if budget >= longest:
        return f"the budget of {budget} tokens holds the engine's {longest}"
    if settings.config.dense_below >= longest:
        return f"the engine's {longest} tokens are within dense_below, {settings.config.dense_below}"
    return None


def describe(plans: list[LayerPlan], spec: Any, settings: Settings) -> str:
    """One line for the log: which layers are sparse, which are not and why, and the bytes of the bounds."""
    reasons: dict[tuple[str, str], list[int]] = {}
    for plan in plans:
        reasons.setdefault((plan.path, plan.reason), []).append(plan.layer)
    words = {"sparse": "read", "dense": "are dense:"}
    layers = [
        f"layers {ranges(sorted(found))} {words[path]} {why}" for (path, why), found in sorted(reasons.items())[::-1]
    ]
    kind, block = settings.config.bounds, spec.unpadded_page_size_bytes
    bounds = spec.num_kv_heads * bytes_of_bounds(spec.head_size, kind, spec.dtype)
    return (
        f"Quest: {'; '.join(layers)}. Pages are the blocks of {spec.block_size} tokens. Bounds ({kind}) take {bounds} "
        f"bytes of each block of {spec.page_size_bytes}, beside {block} of keys and values."
    )


def ranges(numbers: list[int]) -> str:
    """Ascending numbers, with runs of them as 2-5."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)
