"""The attention function that transformers calls: it hands queries, keys and values to a :class:`LayerAttention`.

The caller passes the LayerAttention to the model as a keyword, which transformers hands on to the attention function.
The model gets positions, and neither a mask nor a cache: both are the LayerAttention's business.
"""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..library import HEAD_DIMS

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

#: The name under which transformers knows this function.
IMPLEMENTATION = "quest_eval"


class LayerAttention(Protocol):
    """The attention of every layer in one forward pass."""

    def attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """A layer's attention: new queries [B, Hq, T, D], keys and values [B, Hkv, T, D], with RoPE -> [B, T, Hq, D].

        A token of a sliding layer sees ``window`` tokens, itself included; None: all.
        """


def install(model: Any) -> Any:
    """Make ``model`` attend by this function; returns its text configuration.

    Raises:
        ValueError: a model whose attention the policies do not cover.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    config = model.config.get_text_config(decoder=True)
    name = type(model).__name__
    kinds = set(layer_kinds(config))
    if "full_attention" not in kinds or not kinds <= {"full_attention", "sliding_attention"}:
        raise ValueError(
            "the evaluation is for models with full attention in all layers, or in some beside sliding ones, "
            f"got {name} with {', '.join(sorted(kinds))}"
        )
    if any(parameter.endswith("sinks") for parameter, _ in model.named_parameters()):
        raise ValueError(f"the evaluation's policies are for plain attention, and {name} has learned attention sinks")
    if head_dim(config) not in HEAD_DIMS:
        raise ValueError(f"head_dim of {name} must be one of {', '.join(map(str, HEAD_DIMS))}, got {head_dim(config)}")
    AttentionInterface.register(IMPLEMENTATION, _forward)
    AttentionMaskInterface.register(IMPLEMENTATION, lambda *_, **__: None)
    model.set_attn_implementation(IMPLEMENTATION)
    if config._attn_implementation != IMPLEMENTATION:
        raise ValueError(f"{name} does not let its attention implementation be set")
    return config


def layer_kinds(config: Any) -> list[str]:
    """The kind of each layer, such as "full_attention" or "sliding_attention", of a text configuration."""
    kinds: list[str] | None = getattr(config, "layer_types", None)
    if kinds:
        return kinds
    sliding = getattr(config, "sliding_window", None) is not None
    return ["sliding_attention" if sliding else "full_attention"] * config.num_hidden_layers


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def forward(model: Any, attention: LayerAttention, ids: Tensor, start: int) -> Tensor:
    """The logits [B, V] behind the last of ids [B, T], whose first token is at position ``start``."""
    position_ids = torch.arange(start, start + ids.shape[1], device=ids.device)[None]
    # transformers takes a mask of four dimensions as it is, and so makes none of its own.
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=ids.device)
    out = model(
        ids,
        attention_mask=mask,
        position_ids=position_ids,
        use_cache=False,
        logits_to_keep=1,
        quest_eval_attention=attention,
    )
    logits: Tensor = out.logits[:, -1]
    return logits


def rotation(model: Any) -> Callable[[Tensor, int], Tensor] | None:
    """A function that rotates keys [B, H, n, D] as if they were a number of tokens later; None where there is no RoPE.

    A rotation by a, then by b, is one by a + b: so keys that are rotated already can be moved. Models with sliding
    layers may have a RoPE for each kind of layer: it is that of full attention.
    """
    rotary = getattr(model.get_decoder(), "rotary_emb", None)
    apply = getattr(sys.modules[type(model).__module__], "apply_rotary_pos_emb", None)
    if rotary is None or apply is None:
        return None
    kind = ("full_attention",) if "layer_type" in inspect.signature(rotary.forward).parameters else ()
    factor = "_".join((*kind, "attention_scaling"))

    def rotate(keys: Tensor, positions: int) -> Tensor:
        where = torch.full((1, 1), positions, device=keys.device)
        # Scaled variants of RoPE multiply queries and keys by a factor, which these keys have already.
        cos, sin = (table / getattr(rotary, factor, 1.0) for table in rotary(keys, where, *kind))
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
    quest_eval_attention: LayerAttention | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    if quest_eval_attention is None:
        raise ValueError(
            f"attention '{IMPLEMENTATION}' runs in a PolicyDecoder only, and {type(module).__name__} was called "
            "without one or does not hand keywords on: "
            "call model.set_attn_implementation('sdpa') to use the model by itself"
        )
    for name, feature in (("softcap", softcap), ("s_aux", s_aux)):
        if feature is not None:
            raise ValueError(f"the evaluation's policies are for plain attention, and this model's has {name}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return quest_eval_attention.attend(module, query, key, value, scale, sliding_window), None
