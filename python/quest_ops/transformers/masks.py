"""Masks of the attention "quest": the number of a step's real tokens in each row.

Rows are stored without their left padding, and the cache knows each row's length, so past steps need no mask. Of the
step's own tokens the first ones are padding. The attention itself adds causality and a layer's sliding window. So
[B, 1, 1, 1] numbers replace the [B, 1, T, L] booleans of transformers. They have four dimensions because transformers
passes masks of four dimensions on unchanged.
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
    """The mask function "quest".

    Packed sequences, blocks of images, bidirectional masks and other caches get transformers' own mask.

    Args:
        attention_mask: bool [B, tokens], or None.
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, local_size, allow_is_causal_skip, use_vmap,
            kwargs: as transformers calls mask functions.

    Returns:
        int32 [B, 1, 1, 1], the number of each row's real new tokens. None where they are all real, and where the step
        is of one token, those of the cache too.

    Raises:
        ValueError: padding that is not on the left, or a mask that contradicts the cache. On a GPU a step of one token
            is checked only with ``QUEST_OPS_CHECK=1`` in the environment.
    """
    # transformers forbids the skip for masks with additions, and for a static cache's steps of a single token.
    plain = not use_vmap and (allow_is_causal_skip or q_length == 1) and "allow_is_bidirectional_skip" not in kwargs
    plain = plain and local_size in (None, getattr(kwargs.get("config"), "sliding_window", None))
    # QuestCache always returns the new keys alone. Other caches do so in a first step only, which looks the same.
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
        # Some models, such as BioGPT, take None for a mask of ones. So in the steps of a padded batch None is left out
        # for their single tokens. A prefill whose tokens are all real needs None: it then runs without a mask.
        if bool((attention_mask if q_length == 1 else real).all()):
            return None
    return real.sum(-1, dtype=torch.int32)[:, None, None, None]


def real_tokens(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """The number of each row's real new tokens, int32 [B], from the mask of :func:`quest_mask`; None: all are real.

    Raises:
        ValueError: a mask that :func:`quest_mask` did not make.
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
