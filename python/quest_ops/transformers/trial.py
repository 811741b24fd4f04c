"""A trial of a model with a small QuestCache, before the real one is made.

No configuration tells how a model's code uses its cache. Some models attend twice to keys given once, or give keys of
one layer to another, or call no attention function at all. So a prefill and a decoding step run, and every layer of
attention must have stored each token once. Both steps are as short as such steps can be.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..config import QuestConfig
from ..ops import MAX_NEW_TOKENS
from .generation import CACHE_NAME
from .layer import QuestCacheLayer

#: A small budget in a cache of two pages, so that layers which can be sparse are sparse.
TRIAL_CONFIG = QuestConfig(budget=16, page_size=16, sink_pages=0, dense_layers=0)
TRIAL_TOKENS = 32


def check_runs(model: Any, cache: Any) -> None:
    """Raise unless ``model``, which has the attention "quest", stores each token once in each layer of ``cache``.

    Models on the meta device, and models that need more inputs than ``input_ids``, are not tried.

    Args:
        model: a transformers model.
        cache: an empty QuestCache, of ``TRIAL_TOKENS`` tokens and with ``TRIAL_CONFIG``.

    Raises:
        ValueError: the layer that got other tokens than the step's, or the model's own error.
    """
    _check_causal(model)
    if model.device.type == "meta":
        return
    ids = torch.ones((1, MAX_NEW_TOKENS + 1), dtype=torch.int64, device=model.device)
    with _inference(model):
        try:
            for step in (ids, ids[:, :1]):
                before = [_columns(layer) for layer in cache.layers]
                model(input_ids=step, use_cache=True, **{CACHE_NAME: cache})
                _check_stored(cache, before, step.shape[1])
        except Exception as error:
            if _runs_without_cache(model, ids):
                name = type(model).__name__
                raise ValueError(
                    f"{name} cannot run with a QuestCache, as a trial of two steps shows: {error}"
                ) from error


def _check_causal(model: Any) -> None:
    """Refuse modules that say ``is_causal=False`` in a model that knows eager attention alone, which ignores it."""
    attends = (module for module in model.modules() if hasattr(module, "layer_idx"))
    if not model._supports_sdpa and any(getattr(module, "is_causal", True) is False for module in attends):
        raise ValueError(
            f"{type(model).__name__} has attention with is_causal=False, which its own attention ignores: set it to "
            "what its masks say"
        )


def _columns(layer: Any) -> int:
    return layer.columns if isinstance(layer, QuestCacheLayer) else 0


def _check_stored(cache: Any, before: list[int], tokens: int) -> None:
    for index, (layer, columns) in enumerate(zip(cache.layers, before, strict=True)):
        stored = _columns(layer) - columns
        if isinstance(layer, QuestCacheLayer) and stored != tokens:
            raise ValueError(
                f"layer {index} stored {stored} tokens in a step of {tokens}; its attention must get the keys that "
                "update() returned, once"
            )


def _runs_without_cache(model: Any, ids: torch.Tensor) -> bool:
    """Whether token numbers are all that the model needs."""
    try:
        model(input_ids=ids, use_cache=False)
    except Exception:
        return False
    return True


@contextmanager
def _inference(model: Any) -> Iterator[None]:
    """Neither gradients nor dropout nor compiling; leaves the model as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module in training:
            module.training = True
