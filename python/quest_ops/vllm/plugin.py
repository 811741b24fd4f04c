"""The entry point: Quest is read from the settings, checked, and handed to the workers.

vLLM calls :func:`register` in each of its processes. It changes nothing until an engine is configured with Quest's
settings.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from ..ops import HEAD_DIMS, MAX_NEW_TOKENS
from .settings import VARIABLE, RefusedError, Settings, parse

#: The versions of vLLM whose interfaces this is written for, and was tested with.
VERSIONS = ("0.32",)
_EXTENSION = "quest_ops.vllm.worker.QuestWorker"


def register() -> None:
    """Have each engine's configuration looked at once it is complete. Safe to call again."""
    from vllm.config import VllmConfig

    complete = VllmConfig.__post_init__
    if hasattr(complete, "quest_ops"):
        return

    @functools.wraps(complete)
    def completed(self: Any) -> None:
        complete(self)
        turn_on(self)

    completed.quest_ops = True  # type: ignore[attr-defined]
    VllmConfig.__post_init__ = completed


def turn_on(vllm_config: Any) -> None:
    """Turn Quest on in an engine's configuration, where it is asked for.

    Raises:
        RefusedError: it is asked for, and cannot work. It comes before any process or model is started.
    """
    model, additional = vllm_config.model_config, vllm_config.additional_config
    asked = additional.get("quest") if isinstance(additional, dict) else None
    if asked is None:
        asked = parse(os.environ.get(VARIABLE, ""))
    if not asked or model is None or model.is_submodel_config or model.runner_type == "draft":
        return
    if not isinstance(additional, dict):
        raise RefusedError("quest_ops: additional_config must be a dict to carry the settings to the workers")
    if not isinstance(asked, dict):
        raise RefusedError(f'quest_ops: additional_config["quest"] must be a dict of settings, got {asked!r}')
    refuse_engine(vllm_config)
    settings = Settings.of(asked, vllm_config.cache_config.block_size, model.get_total_num_hidden_layers())
    vllm_config.additional_config = {**additional, "quest": settings.keys}
    vllm_config.parallel_config.worker_extension_cls = vllm_config.parallel_config.worker_extension_cls or _EXTENSION
    if vllm_config.device_config.device_type == "cuda":
        from vllm.v1.attention.backends.registry import AttentionBackendEnum

        vllm_config.attention_config.backend = AttentionBackendEnum.FLASH_ATTN


def refuse_engine(vllm_config: Any) -> None:
    """Raise RefusedError for an engine or a model that Quest does not work with."""
    import vllm

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    speculative = vllm_config.speculative_config
    drafted = 0 if speculative is None else speculative.num_speculative_tokens or 0
    backend = getattr(vllm_config.attention_config.backend, "name", None)
    own = {"cpu": "CPU_ATTN", "cuda": "FLASH_ATTN"}.get(vllm_config.device_config.device_type)
    cache = vllm_config.cache_config.cache_dtype
    dtype = str(model.dtype).removeprefix("torch.")
    extension = parallel.worker_extension_cls
    versions = " or ".join(VERSIONS)
    checks = [
        (not vllm.__version__.startswith(VERSIONS), f"was tested with vLLM {versions} only, got {vllm.__version__}"),
        (own is None, f"runs on vLLM's CPU and CUDA platforms, got {vllm_config.device_config.device_type}"),
        (model.use_mla, "does not work with multi-head latent attention (MLA), which has no keys of its own"),
        (model.is_hybrid, "does not work with hybrid models: their blocks are larger than a page"),
        (model.is_encoder_decoder, "does not work with encoder-decoder models"),
        (model.is_mm_prefix_lm, "does not work with prefix language models, whose images attend in both directions"),
        (model.runner_type != "generate", f"works with models that generate, got {model.runner_type}"),
        (
            cache not in ("auto", dtype),
            f"needs keys and values in the model's dtype, {dtype}: kv_cache_dtype must be auto, got {cache}",
        ),
        (
            model.get_head_size() not in HEAD_DIMS,
            f"takes a head_dim of {', '.join(map(str, HEAD_DIMS))}, got {model.get_head_size()}",
        ),
        (drafted >= MAX_NEW_TOKENS, f"takes at most {MAX_NEW_TOKENS - 1} drafted tokens a step, got {drafted}"),
        (parallel.decode_context_parallel_size > 1, "does not work with decode context parallelism"),
        (parallel.prefill_context_parallel_size > 1, "does not work with prefill context parallelism"),
        (
            vllm_config.kv_transfer_config is not None,
            "does not work with KV transfer: connectors do not move the bounds of a block",
        ),
        (vllm_config.cache_config.kv_sharing_fast_prefill, "does not work with kv_sharing_fast_prefill"),
        (backend not in (None, own), f"runs on the attention backend {own}, got {backend}"),
        (
            bool(extension) and not _is_ours(extension),
            f"needs worker_extension_cls: derive {extension} from {_EXTENSION}",
        ),
    ]
    for refused, sentence in checks:
        if refused:
            raise RefusedError(f"quest_ops {sentence}")


def _is_ours(name: str) -> bool:
    from vllm.utils.import_utils import resolve_obj_by_qualname

    from .worker import QuestWorker

    return name == _EXTENSION or issubclass(resolve_obj_by_qualname(name), QuestWorker)
