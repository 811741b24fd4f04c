"""Continuous batching (``generate_batch``): dense, since its cache has no page bounds.

Some versions of transformers look up the attention "paged|quest" for it. Later ones, 5.23 among them, refuse any name
but their own before anything runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dense import Features, Past, prefill
from ._say import say_once


@torch.compiler.disable  # type: ignore[untyped-decorator]
def paged_quest_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001 - transformers passes it
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention "paged|quest": sequences packed in one row, with ends in ``cu_seq_lens_q`` and ``cu_seq_lens_k``.

    Args:
        query, key, value: [1, heads, total new tokens, D].
        attention_mask: not used.
        scaling, sliding_window, softcap, s_aux: as in
            :func:`quest_ops.transformers.attention.quest_attention_forward`.
        kwargs: transformers' paged cache and its indices.

    Returns:
        [1, total new tokens, Hq, D], and None for the weights.
    """
    say_once("attention 'quest' runs dense in continuous batching, whose cache has no page bounds")
    indices = {name: kwargs[name] for name in ("read_index", "write_index")}
    # [total tokens, Hkv, D]
    k, v = kwargs["cache"].update(key_states=key, value_states=value, layer_idx=module.layer_idx, **indices)
    k, v = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
    ends_k = kwargs["cu_seq_lens_k"]
    if isinstance(ends_k, dict):
        ends_k = ends_k["full_attention" if sliding_window is None else "sliding_attention"]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    features = Features(scale, sliding_window, softcap, s_aux)
    out = query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1])
    ends_q, ends_k = kwargs["cu_seq_lens_q"].tolist(), ends_k.tolist()
    for start_q, end_q, start_k, end_k in zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False):
        if end_q == start_q:
            continue
        new = end_k - (end_q - start_q)
        past = None
        if new > start_k:
            place = torch.arange(new - start_k, device=k.device)
            length = torch.tensor([new - start_k], device=k.device)
            past = Past(k[:, :, start_k:new], v[:, :, start_k:new], place[None], length)
        q = query[:, :, start_q:end_q]
        out[:, start_q:end_q] = prefill(q, k[:, :, new:end_k], v[:, :, new:end_k], None, features, past)
    return out, None
