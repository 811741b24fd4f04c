"""What a worker process adds: the backend in the place of vLLM's own, the prompts' lengths, and the report.

The plugin names :class:`QuestWorker` as the engine's ``worker_extension_cls``. vLLM imports it in each worker before
the model is made, on any machine.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from ..report import LayerPlan, Report

if TYPE_CHECKING:
    from vllm.config import VllmConfig

register_backend(AttentionBackendEnum.CPU_ATTN, "quest_ops.vllm.cpu.CPUQuestBackend")
register_backend(AttentionBackendEnum.FLASH_ATTN, "quest_ops.vllm.cuda.CUDAQuestBackend")
# An engine that ran in this process before has left vLLM's own backend there.
selector._cached_get_attn_backend.cache_clear()

_prompt_lens: list[np.ndarray] = []


def prompt_lens(requests: int) -> np.ndarray | None:
    """[requests], the prompt lengths of the current step's requests, or None where the model runner does not tell."""
    return _prompt_lens[0][:requests] if _prompt_lens else None


def _tell_prompt_lens() -> None:
    """Have vLLM's model runner tell the prompt lengths of each step before it builds the step's metadata.

    Metadata say whether a request is in its prefill, but not where its prompt ends. After a preemption a chunk may have
    both prompt tokens and generated ones.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    build = GPUModelRunner._build_attention_metadata

    @functools.wraps(build)
    def told(self: Any, *args: Any, **kwargs: Any) -> Any:
        _prompt_lens[:] = [self.input_batch.num_prompt_tokens]
        try:
            return build(self, *args, **kwargs)
        finally:
            _prompt_lens.clear()

    GPUModelRunner._build_attention_metadata = told


_tell_prompt_lens()


def report_of(vllm_config: VllmConfig) -> Report:
    """The counts of this worker's layers. Synchronises.

    Raises:
        RuntimeError: the settings have no ``report``.
    """
    counts = [
        impl.quest.counts for impl in _impls(vllm_config) if impl.quest is not None and impl.quest.counts is not None
    ]
    if not counts:
        raise RuntimeError("quest_ops has counted nothing: start the engine with report=0 among the settings")
    # A dense layer counts nothing, so any counters have zeros in its place.
    layers = [(impl.quest_plan, impl.quest.counts if impl.quest else counts[0]) for impl in _impls(vllm_config)]
    return Report(counters.read([plan])[0] for plan, counters in layers)


def _impls(vllm_config: VllmConfig) -> list[Any]:
    """The attention of this worker's layers, in the model's order."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    impls = [impl for layer in layers if getattr(impl := getattr(layer, "impl", None), "quest_plan", None)]
    return sorted(impls, key=lambda impl: impl.quest_plan.layer)


class QuestWorker:
    """Mixed into vLLM's worker. A worker extension of one's own must derive from it."""

    vllm_config: VllmConfig

    def quest_report(self) -> list[list[Any]]:
        """The counts of this worker's sparse layers, as plain values for another process.

        Returns:
            For each layer its plan, as :class:`quest_ops.report.LayerPlan`, and the other values of ``LayerCounts``.
        """
        return [
            [
                list(x.plan),
                *(x.prefills, x.steps, x.pages_read, x.pages_held, x.bytes_read, x.bytes_dense),
            ]
            for x in report_of(self.vllm_config)
        ]

    def quest_plan(self) -> list[LayerPlan]:
        """How each layer decodes, and why."""
        return [impl.quest_plan for impl in _impls(self.vllm_config)]
