"""The way from transformers into a session: an attention function that hands queries, keys and values over.

A session passes itself to the model as a keyword, which transformers hands on to the attention function. Position, mask
and cache are the session's business: the model is given positions, no mask and no cache.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..cache import HEAD_DIMS

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

IMPLEMENTATION = "quest_evaluation"


class Attention(Protocol):
    """What the attention function hands over to."""

    def attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """A layer's new queries [B, Hq, T, D], keys and values [B, Hkv, T, D], with RoPE -> [B, T, Hq, D]."""


def install(model: Any) -> Any:
    """Make ``model`` attend through sessions; returns its text configuration.

    Raises:
        ValueError: a model of another kind than the policies are for.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    config = model.config.get_text_config(decoder=True)
    name = type(model).__name__
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ValueError(f"the evaluation is for models with full attention in all layers, got {name} with {kinds}")
    if head_dim(config) not in HEAD_DIMS:
        raise ValueError(f"head_dim of {name} must be one of {', '.join(map(str, HEAD_DIMS))}, got {head_dim(config)}")
    AttentionInterface.register(IMPLEMENTATION, _forward)
    AttentionMaskInterface.register(IMPLEMENTATION, lambda *_, **__: None)
    model.set_attn_implementation(IMPLEMENTATION)
    if config._attn_implementation != IMPLEMENTATION:
        raise ValueError(f"{name} does not let its attention implementation be set")
    return config


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def forward(model: Any, session: Attention, ids: Tensor, start: int) -> Tensor:
    """The logits [B, V] behind the last of ids [B, T], whose first token is at position ``start``."""
    position_ids = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
    # transformers leaves a mask of four dimensions as it is, and so makes none.
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)
    out = model(
        ids,
        attention_mask=mask,
        position_ids=position_ids,
        use_cache=False,
        logits_to_keep=1,
        quest_session=session,
    )
    logits: Tensor = out.logits[:, -1]
    return logits


def rotation(model: Any) -> Callable[[Tensor, int], Tensor] | None:
    """A function that turns keys [B, H, n, D] as if they were so many tokens later; None where there is no RoPE.

    Turning by a, then by b, is turning by a + b: so keys that have their rotation already can be moved.
    """
    rotary = getattr(model.get_decoder(), "rotary_emb", None)
    apply = getattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb", None)
    if rotary is None or apply is None:
        return None

    def rotate(keys: Tensor, positions: int) -> Tensor:
        where = torch.full((1, 1), positions, device=keys.device)
        # Scaled variants of RoPE multiply queries and keys by a factor, which these keys have already.
        cos, sin = (part / getattr(rotary, "attention_scaling", 1.0) for part in rotary(keys, where))
        turned: Tensor = apply(keys, keys, cos, sin)[1]
        return turned

    return rotate


def _forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    quest_session: Attention | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    if quest_session is None:
        raise ValueError(
            f"attention '{IMPLEMENTATION}' runs in a session only, and {type(module).__name__} was called by another "
            "or does not hand keywords on: call model.set_attn_implementation('sdpa') to use the model by itself"
        )
    for name, feature in (("sliding_window", sliding_window), ("softcap", softcap), ("s_aux", s_aux)):
        if feature is not None:
            raise ValueError(f"the evaluation's policies are for plain attention, and this model's has {name}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return quest_session.attend(module, query, key, value, scale), None
