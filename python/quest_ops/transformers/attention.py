"""The attention function "quest": hands a layer's queries, keys and values to its layer of the QuestCache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .._autograd import refuse_backward
from ..dense import Features, attend, prefill
from ._say import say_once
from .layer import QuestCacheLayer
from .masks import is_quest_mask, real_tokens


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

    Steps of more than 8 tokens are a prefill and dense. Keys that come from no QuestCache are attended to densely too.
    A QuestCache stores values only. So a first prefill, which does not read it, has gradients, and the backward of any
    other step raises.

    Args:
        module: the layer's attention module.
        query: [B, Hq, T, D].
        key, value: [B, Hkv, T, D] from a QuestCache, or [B, Hkv, L, D] from another cache.
        attention_mask: from :func:`quest_ops.transformers.masks.quest_mask`.
        dropout: 0 with a QuestCache.
        scaling, sliding_window, softcap, s_aux: scale, window, softcap and sinks of
            :class:`quest_ops.dense.Features`.
        kwargs: further arguments of transformers.

    Returns:
        [B, T, Hq, D], and None for the weights.

    Raises:
        ValueError: a mask or a feature that is not supported, before anything is written.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    features = Features(scale, sliding_window, softcap, s_aux, dropout)
    layer: QuestCacheLayer | None = getattr(key, "_quest_layer", None)
    if layer is None:
        return _other_cache(module, query, key, value, attention_mask, features, kwargs), None
    layer.arrived()
    if torch.is_autocast_enabled(query.device.type):
        query = query.to(key.dtype)
    if kwargs.get("position_bias") is not None:
        raise ValueError(f"attention 'quest' does not support position_bias, which layer {layer.index} asks for")
    if dropout:
        raise ValueError(f"attention 'quest' is for inference: call model.eval() first, got dropout {dropout}")
    real = real_tokens(attention_mask, query)
    reads_cache = layer.decide(query.shape[2]).path != "prefill" or not layer.known_empty
    out = layer.attend(query, key, value, real, features)
    if reads_cache:
        out = refuse_backward("attention 'quest' over a QuestCache", out, query, key, value)
    return out, None


def _other_cache(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, features: Features, kwargs: dict[str, Any]
) -> Tensor:
    """Dense attention without a QuestCache: training, scoring, another cache."""
    tokens = q.shape[2]
    if k.shape[2] > tokens and not torch.compiler.is_compiling() and getattr(module, "is_causal", True):
        say_once(
            "attention 'quest' runs densely because the keys come from another cache: pass "
            "past_key_values=quest_ops.transformers.QuestCache(...)"
        )
    if mask is not None and is_quest_mask(mask, q):
        return prefill(q, k, v, real_tokens(mask, q), features)
    if features.softcap is None and features.sinks is None:
        out: Tensor
        out, _ = sdpa_attention_forward(
            module, q, k, v, mask, dropout=features.dropout, scaling=features.scale, **kwargs
        )
        return out
    if mask is None and k.shape[2] == tokens:
        return prefill(q, k, v, None, features)
    if mask is None:  # transformers leaves out the mask of a single token, which sees everything
        mask = torch.ones(1, 1, tokens, k.shape[2], dtype=torch.bool, device=q.device)
    return attend(q, k, v, mask if mask.dtype == torch.bool else mask >= 0, features)
