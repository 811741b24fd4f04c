"""The rules that decide, from its configuration, whether QuestCache can serve a model."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import get_layer_types_and_kwargs

from ..ops import HEAD_DIMS, check_choice

#: Kinds of layers with keys: of full attention, or with a sliding window; each alone, or beside a state.
FULL, SLIDING = ("full_attention", "hybrid"), ("sliding_attention", "hybrid_sliding")


def layer_kinds(text_config: Any) -> tuple[list[str], Any]:
    """The kind of each layer and the arguments of its cache, as ``get_layer_types_and_kwargs`` gives them.

    Raises:
        ValueError: a configuration that does not tell them.
    """
    try:
        kinds, arguments = get_layer_types_and_kwargs(text_config)
    except AttributeError as error:
        raise ValueError(f"the configuration of {text_config.model_type} does not tell its layers: {error}") from error
    return kinds, arguments


def check_model(config: Any, kinds: list[str]) -> list[tuple[int, int]]:
    """The KV heads and the head_dim of each layer; 0 in layers without keys.

    Args:
        config: of a transformers model.
        kinds: of attention, one for each layer, from ``get_layer_types_and_kwargs``.

    Raises:
        ValueError: a model without attention, an encoder-decoder model, cross-attention, multi-head latent attention,
            keys and values of different head_dim, or a layer of full attention whose head_dim the operators lack.
    """
    text_config = config.get_text_config(decoder=True)
    name = type(config).__name__.removesuffix("Config")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"QuestCache supports decoder-only models, got {name}, which is an encoder-decoder model")
    if getattr(text_config, "cross_attention_layers", None) or getattr(text_config, "add_cross_attention", False):
        raise ValueError(f"QuestCache supports self-attention alone, got {name}, which has cross-attention layers")
    rank = getattr(text_config, "kv_lora_rank", None)
    if rank:
        raise ValueError(
            f"QuestCache stores keys and values, got {name}, whose multi-head latent attention caches a latent of rank "
            f"{rank} in their place"
        )
    # Models with layers of several shapes keep a configuration for each layer.
    layers = getattr(text_config, "per_layer_config", None) or [text_config] * len(kinds)
    shapes = []
    for index, (kind, layer) in enumerate(zip(kinds, layers, strict=False)):
        query_heads = getattr(layer, "num_attention_heads", None)
        if kind not in FULL + SLIDING or query_heads is None:
            shapes.append((0, 0))
            continue
        key_dim, value_dim = _head_dims(layer)
        if value_dim != key_dim:
            raise ValueError(
                f"QuestCache needs keys and values of one head_dim, got {key_dim} and {value_dim} in layer {index} "
                f"of {name}"
            )
        if kind in FULL:
            check_choice("the model's head_dim", key_dim, HEAD_DIMS)
        shapes.append((getattr(layer, "num_key_value_heads", None) or query_heads, key_dim))
    if kinds and not any(heads for heads, _ in shapes):
        raise ValueError(f"QuestCache serves layers of attention, and {name} has none")
    return shapes


def _head_dims(layer: Any) -> tuple[int, int]:
    """The numbers of elements of a layer's keys and values, for each head."""
    key_dim = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
    return key_dim, getattr(layer, "v_head_dim", None) or key_dim
