"""Masks of the attention "quest": the number of a step's real tokens in each row.

Rows are stored without their left padding, and the cache knows each row's length, so past steps need no mask. Of the
step's own tokens the first ones are padding. The attention itself adds causality and a layer's sliding window. So
[B, 1, 1, 1] numbers replace the [B, 1, T, L] booleans of transformers. They have four dimensions because transformers
passes masks of four dimensions on unchanged.

A mask that is not causal, as of image blocks, stays booleans [B, 1, T, T] over the step's own tokens. Every new token
sees all earlier ones, within the window of its layer.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function, sdpa_mask

# Queries that are compared with a causal mask at a time, so that it need not have the size of the prompt squared.
_BLOCK = 512
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

    Packed sequences and other caches get transformers' own mask. So does a step whose mask is not causal, over its own
    tokens.

    Args:
        attention_mask: bool [B, tokens], or None.
        batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, local_size, allow_is_causal_skip, use_vmap,
            kwargs: as transformers calls mask functions.

    Returns:
        int32 [B, 1, 1, 1], the number of each row's real new tokens. None where they are all real; for a single
        token, only where those of the cache are real too. bool [B, 1, T, T] for a mask that is not causal.

    Raises:
        ValueError: padding that is not on the left, or a mask that contradicts the cache. On a GPU a step of one token
            is checked only with ``QUEST_OPS_CHECK=1`` in the environment.
    """
    # transformers forbids the skip for masks with additions, and for a static cache's steps of a single token.
    plain = not use_vmap and (allow_is_causal_skip or q_length == 1) and "allow_is_bidirectional_skip" not in kwargs
    plain = plain and local_size in (None, getattr(kwargs.get("config"), "sliding_window", None))
    # QuestCache always returns the new keys alone. Other caches do so in a first step only, which looks the same.
    alone = kv_length == q_length and kv_offset == 0 and (isinstance(q_offset, Tensor) or q_offset == 0)
    # Reading a mask on a GPU synchronises, which decoding must not.
    on_gpu = attention_mask is not None and attention_mask.is_cuda
    unchecked = q_length == 1 and on_gpu and os.environ.get("QUEST_OPS_CHECK") != "1"
    checks = not (torch.compiler.is_compiling() or unchecked)
    if not (plain and alone):
        if alone and isinstance(q_offset, Tensor):
            bidirectional_window = "allow_is_bidirectional_skip" in kwargs and local_size is not None
            if bidirectional_window and q_length > 1 and int(q_offset) > 0:
                # transformers' window reaches back one token further than its caches of sliding layers hold.
                raise ValueError(
                    f"a bidirectional step of {q_length} tokens over a cache of {int(q_offset)} is not supported in "
                    f"layers with a sliding window of {local_size}"
                )
            # Token types and the like come for the new tokens alone, so positions count from the first of them.
            if attention_mask is not None:
                if checks:
                    _check_lengths(attention_mask, q_length, q_offset)
                attention_mask = attention_mask[:, -q_length:]
            q_offset = 0
        mask: Tensor | None = sdpa_mask(
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
        single = q_length == 1 or torch.compiler.is_compiling()
        if not alone or single or mask is None or not _is_causal(mask, attention_mask):
            return mask
        # Token types of text alone leave the mask causal.
        return None if attention_mask is None or bool(attention_mask.all()) else _count(attention_mask)
    if attention_mask is None:
        return None
    real = attention_mask[:, -q_length:]
    if checks:
        _check_lengths(attention_mask, q_length, q_offset)
        _check_left(real)
        # Some models, such as BioGPT, take None for a mask of ones. So a single token of a padded batch has a mask.
        # More tokens have none where they are all real: a prefill without a mask is faster.
        if bool((attention_mask if q_length == 1 else real).all()):
            return None
    return _count(real)


def step_mask(mask: Tensor | None, query: Tensor, causal: bool) -> tuple[Tensor | None, Tensor | None]:
    """A step's real tokens, and its new tokens' view of each other.

    Args:
        mask: from :func:`quest_mask`, or bool [B or 1, 1, T, T] over the step's own tokens.
        query: [B, Hq, T, D].
        causal: whether the new tokens see no later ones, where the mask does not say.

    Returns:
        real: int32 [B], the number of each row's real tokens; None: all.
        visible: bool [B or 1, 1, T, T], the new tokens that each new token sees; None: the earlier ones.

    Raises:
        ValueError: any other mask, or one that hides tokens behind or between those of a row.
    """
    batch, _, tokens, _ = query.shape
    real = visible = None
    if mask is not None and is_quest_mask(mask, query):
        real = mask.to(query.device).view(-1)
    elif mask is not None:
        if mask.dtype != torch.bool or mask.shape[1:] != (1, tokens, tokens) or mask.shape[0] not in (1, batch):
            raise ValueError(f"{_REMEDY}, got a mask of shape {tuple(mask.shape)}, {mask.dtype}")
        visible = mask.to(query.device)
        seen = visible[:, 0].any(1).expand(batch, -1)  # padding is what no token sees
        checks = tokens > 1 and not torch.compiler.is_compiling()
        if checks:
            _check_left(seen)
        real = None if checks and bool(seen.all()) else _count(seen).view(-1)
    if visible is None and not causal:
        visible = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=query.device).expand(1, 1, tokens, tokens)
    return real, None if tokens == 1 else visible


def is_quest_mask(mask: Tensor, query: Tensor) -> bool:
    return mask.dtype == torch.int32 and mask.shape == (query.shape[0], 1, 1, 1)


def _count(real: Tensor) -> Tensor:
    return real.sum(-1, dtype=torch.int32)[:, None, None, None]


def _is_causal(mask: Tensor, real: Tensor | None) -> bool:
    """Whether a mask [B, 1, T, T] is that of causal attention with left padding."""
    tokens = mask.shape[-1]
    if real is not None and (real.shape[1] != tokens or bool((real[:, :-1] & ~real[:, 1:]).any())):
        return False
    place, same = torch.arange(tokens, device=mask.device), torch.ones((), dtype=torch.bool, device=mask.device)
    for start in range(0, tokens, _BLOCK):
        causal = place <= place[start : start + _BLOCK, None]
        if real is not None:
            causal = causal & real[:, None, None]
        same &= (mask[:, :, start : start + _BLOCK] == causal).all()
    return bool(same)


def _check_left(real: Tensor) -> None:
    if bool((real[:, :-1] & ~real[:, 1:]).any()):
        raise ValueError(f"{_REMEDY}, got padding behind or between the tokens of a row")


def _check_lengths(attention_mask: Tensor, q_length: int, q_offset: Tensor | int) -> None:
    lengths = getattr(q_offset, "_quest_lengths", None)
    rows, columns = attention_mask.shape
    if lengths is not None and lengths.shape[0] != rows:
        raise ValueError(f"this QuestCache was made for a batch of {lengths.shape[0]}, got {rows} sequences")
    seen = int(q_offset)
    if columns != seen + q_length:
        raise ValueError(
            f"{_REMEDY}, got {columns} columns for {seen} tokens in the cache and {q_length} new ones. "
            "Call cache.reset() before another prompt"
        )
    if lengths is not None and not torch.equal(attention_mask[:, :seen].sum(-1).to(lengths), lengths):
        raise ValueError(
            f"{_REMEDY}: tokens that are in the cache cannot be masked any more, nor padding unmasked; got rows of "
            f"{attention_mask[:, :seen].sum(-1).tolist()} tokens where the cache holds {lengths.tolist()}"
        )
