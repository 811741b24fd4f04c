"""Masks as the attention "quest" takes them: how many of a step's tokens are real in each row, and nothing more.

A left-padded row is stored without its padding, so past steps need no mask: the cache knows how long each row is. Of
the step's own tokens the first are padding and the rest real. Causality, and a layer's sliding window, are the
attention's own business. So [B, 1, 1, 1] numbers say what transformers says in [B, 1, T, L] booleans. Four dimensions,
because transformers hands masks of four dimensions on as they are.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

_REMEDY = (
    "attention 'quest' honours left padding and nothing else: pad on the left (tokenizer.padding_side = 'left'), and "
    "pass a 2-D attention_mask with a column for each token in the cache and each new one"
)


def quest_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Tensor | int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """The mask function "quest": int32 [B, 1, 1, 1], a row's number of real new tokens; None where all are.

    Masks that it cannot express (packed sequences, blocks of images, bidirectional ones) and those of other caches are
    transformers' own.

    Args:
        attention_mask: bool [B, tokens], or None.
        Others: as transformers calls mask functions.

    Raises:
        ValueError: padding that is not on the left, or a mask that contradicts what the cache holds. On a GPU a step of
            one token is checked only where the environment has ``QUEST_OPS_CHECK=1``.
    """
    # transformers forbids the skip for masks with additions, and for a static cache's steps of one token.
    plain = not use_vmap and (allow_is_causal_skip or q_length == 1) and "allow_is_bidirectional_skip" not in kwargs
    plain = plain and local_size in (None, getattr(kwargs.get("config"), "sliding_window", None))
    # Only QuestCache returns nothing but the new keys when there are others. A first step looks the same in any cache.
    alone = kv_length == q_length and kv_offset == 0 and (isinstance(q_offset, Tensor) or q_offset == 0)
    if not (plain and alone):
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=allow_is_causal_skip,
            use_vmap=use_vmap,
            **kwargs,
        )
    if attention_mask is None:
        return None
    real = attention_mask[:, -q_length:]
    unchecked = q_length == 1 and real.is_cuda and os.environ.get("QUEST_OPS_CHECK") != "1"
    if not (torch.compiler.is_compiling() or unchecked):
        _check(attention_mask, q_length, q_offset)
        if bool(real.all()):
            return None
    return real.sum(-1, dtype=torch.int32)[:, None, None, None]


def real_tokens(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """How many of a row's new tokens are real, int32 [B], from what :func:`quest_mask` returned; None: all.

    Raises:
        ValueError: a mask of another origin.
    """
    if mask is None:
        return None
    if not is_quest_mask(mask, query):
        raise ValueError(f"{_REMEDY}, got a mask of shape {tuple(mask.shape)}, {mask.dtype}")
    return mask.to(query.device).view(-1)


def is_quest_mask(mask: Tensor, query: Tensor) -> bool:
    return mask.dtype == torch.int32 and mask.shape == (query.shape[0], 1, 1, 1)


def _check(attention_mask: Tensor, q_length: int, q_offset: Tensor | int) -> None:
    seen = int(q_offset)
    columns = attention_mask.shape[1]
    if columns != seen + q_length:
        raise ValueError(f"{_REMEDY}, got {columns} columns for {seen} tokens in the cache and {q_length} new ones")
    real = attention_mask[:, seen:]
    if bool((real[:, :-1] & ~real[:, 1:]).any()):
        raise ValueError(f"{_REMEDY}, got padding behind or between the tokens of a row")
    lengths = getattr(q_offset, "_quest_lengths", None)
    if lengths is not None and not torch.equal(attention_mask[:, :seen].sum(-1).to(lengths), lengths):
        raise ValueError(
            f"{_REMEDY}: tokens that are in the cache cannot be masked any more, nor padding unmasked; got rows of "
            f"{attention_mask[:, :seen].sum(-1).tolist()} tokens where the cache holds {lengths.tolist()}"
        )
