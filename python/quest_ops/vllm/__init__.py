"""Quest in vLLM: an entry point that is off unless asked for.

``QUEST_OPS_VLLM=budget=2048,dense_layers=2`` in the environment, or the engine's
``additional_config={"quest": {"budget": 2048}}``, makes ``vllm serve`` and ``LLM(...)`` decode sparsely. docs/vllm.md
is its page.

- ``settings``: the keys, and the layers' budgets.
- ``plugin``: the entry point: reads the settings and refuses what cannot work, before a model loads.
- ``step``: a step's tokens as rows of the operators.
- ``block_tail``: page bounds at the end of each block of vLLM's cache.
- ``backend``, ``cpu``, ``cuda``: the attention backend, on vLLM's own for each platform.
- ``worker``: what a worker adds: the backend's registration and the report.

Importing this module does not import vLLM.
"""

from __future__ import annotations

from typing import Any

from ..report import LayerCounts, LayerPlan, Report

__all__ = ["report"]


def report(llm: Any) -> list[Report]:
    """The pages and bytes that each layer read, for each worker of an engine.

    Args:
        llm: a ``vllm.LLM`` whose settings have ``report``. Of several tensor-parallel workers each counts its KV heads.

    Raises:
        RuntimeError: the engine's settings have no ``report``.
    """
    return [
        Report(LayerCounts(LayerPlan(*plan), *counts) for plan, *counts in layers)
        for layers in llm.collective_rpc("quest_report")
    ]
