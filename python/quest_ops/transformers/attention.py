"""The attention function "quest": hands a layer's queries, keys and values to its layer of the QuestCache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .._autograd import refuse_backward
from ..dense import Features, attend, prefill
from ._say import say_once
from .generation import CACHE_NAME
from .layer import QuestCacheLayer
from .masks import is_quest_mask, step_mask


def quest_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention of one layer, as transformers calls it.

    Steps of more than 8 tokens are a prefill and dense, as is a step of several tokens that is not causal. Keys that
    come from no QuestCache are attended to densely too.
    A QuestCache stores values only. So a first prefill, which does not read it, has gradients, and the backward of any
    other step raises.

    Args:
        module: the layer's attention module.
        query: [B, Hq, T, D].
        key, value: [B, Hkv, T, D] from a QuestCache, or [B, Hkv, L, D] from another cache.
        attention_mask: from :func:`quest_ops.transformers.masks.quest_mask`, or bool [B or 1, 1, T, T].
        dropout: 0 with a QuestCache.
        scaling, sliding_window, softcap, s_aux: scale, window, softcap and sinks of
            :class:`quest_ops.dense.Features`.
        kwargs: further arguments of transformers, ``is_causal`` among them. It outranks the module's attribute.

    Returns:
        [B, T, Hq, D], and None for the weights.

    Raises:
        ValueError: a mask or a feature that is not supported, before anything is written.
        RuntimeError: keys of an earlier step.
    """
    if kwargs.get("output_attentions"):
        raise ValueError(
            "attention 'quest' makes no attention weights, got output_attentions=True: "
            "call model.set_attn_implementation('eager') for them"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    features = Features(scale, sliding_window, softcap, s_aux, dropout)
    layer: QuestCacheLayer | None = getattr(key, "_quest_layer", None)
    if layer is None:
        return _other_cache(module, query, key, value, attention_mask, features, kwargs), None
    if torch.is_autocast_enabled(query.device.type):
        query = query.to(key.dtype)
    layer = layer.serving(query, key, value)
    if kwargs.get("position_bias") is not None:
        raise ValueError(f"attention 'quest' does not support position_bias, which layer {layer.index} asks for")
    if dropout:
        raise ValueError(f"attention 'quest' is for inference: call model.eval() first, got dropout {dropout}")
    real, visible = step_mask(attention_mask, query, _is_causal(module, kwargs))
    if visible is not None and visible is not attention_mask:
        _check_window(layer, query.shape[2], sliding_window)
    is_prefill = visible is not None or layer.decide(query.shape[2]).path == "prefill"
    reads_cache = not (is_prefill and layer.known_empty)
    out = layer.attend(query, key, value, real, features, visible)
    if reads_cache:
        out = refuse_backward("attention 'quest' over a QuestCache", out, query, key, value)
    return out, None


def _is_causal(module: Any, kwargs: dict[str, Any]) -> bool:
    causal = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if causal is None else causal)


def _check_window(layer: QuestCacheLayer, tokens: int, sliding_window: int | None) -> None:
    window = getattr(layer, "window", sliding_window)
    if window is not None and (tokens > window or not layer.known_empty):
        raise ValueError(
            f"is_causal=False is not supported for {tokens} tokens in layer {layer.index}, which has a sliding window "
            f"of {window}, or over a cache that holds tokens"
        )


def _other_cache(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, features: Features, kwargs: dict[str, Any]
) -> Tensor:
    """Dense attention without a QuestCache: training, scoring, another cache."""
    tokens, causal = q.shape[2], _is_causal(module, kwargs)
    if k.shape[2] > tokens and not torch.compiler.is_compiling() and causal:
        say_once(
            "attention 'quest' runs densely because the keys come from another cache: pass "
            f"{CACHE_NAME}=quest_ops.transformers.QuestCache(...)"
        )
    if mask is not None and is_quest_mask(mask, q):
        real, visible = step_mask(mask, q, causal)
        return prefill(q, k, v, real, features, visible=visible)
    if features.softcap is None and features.sinks is None:
        out: Tensor
        out, _ = sdpa_attention_forward(
            module, q, k, v, mask, dropout=features.dropout, scaling=features.scale, **kwargs
        )
        return out
    if mask is None and k.shape[2] == tokens:
        return prefill(q, k, v, None, features, visible=step_mask(None, q, causal)[1])
    if mask is None:  # transformers leaves out the mask of a single token, which sees everything
        mask = torch.ones(1, 1, tokens, k.shape[2], dtype=torch.bool, device=q.device)
    return attend(q, k, v, mask if mask.dtype == torch.bool else mask >= 0, features)
