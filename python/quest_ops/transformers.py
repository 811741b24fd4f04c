"""Quest inside Hugging Face models (transformers 5): dense prefill, sparse decoding, unmodified modelling code.

::

    cache = enable_quest(model, QuestConfig(budget=1024), max_tokens=32768)
    model.generate(input_ids, past_key_values=cache, max_new_tokens=100)

Importing this module registers the attention implementation ``"quest"``. transformers hands an attention function the
keys and values that the cache's ``update()`` returned, and nothing else of the cache, so :class:`QuestLayer` ties what
the operators need (the pages, their bounds, lengths) to the key tensor it returns. Keys and values stay where a static
cache has them, [B, Hkv, L, D], and are viewed as pages without a copy. What ``update()`` returns are the tokens that
are there, so that the same cache works densely under another attention implementation.

Tested with Llama and Qwen3 in eager mode, one sequence at a time. What is not supported raises an error that says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention import MAX_DECODE_TOKENS, QuestConfig, select_pages
from .cache import HEAD_DIMS
from .ops import append_kv, sparse_decode, update_bounds
from .views import empty_bounds, page_view_bhld

try:
    from transformers import AttentionInterface, AttentionMaskInterface, Cache
    from transformers.cache_utils import StaticLayer, get_layer_types_and_kwargs
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask
except ImportError as error:
    raise ImportError(
        f"quest_ops.transformers needs transformers 5 or newer ({error}): run `pip install 'quest_ops[transformers]'`."
    ) from error

#: The name under which transformers knows this attention.
IMPLEMENTATION = "quest"

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

#: Called in each layer of each decoding step with the layer's number, the pages read (int32 [B, T, Hs, K], -1 padded,
#: or None where the layer ran dense) and the number of tokens in the cache.
Observer = Callable[[int, "Tensor | None", int], None]


@dataclass
class _Settings:
    """What the layers of one cache share and its owner may change between steps."""

    config: QuestConfig
    observer: Observer | None = None


@dataclass
class _LayerPages:
    """What the attention function needs of one layer; tied to the keys that ``update()`` returns."""

    layer: int
    settings: _Settings
    k: Tensor  # [N, Hkv, S, D]
    v: Tensor  # [N, Hkv, S, D]
    page_table: Tensor  # [B, P]
    bounds: Tensor  # [N, Hkv, 2, D]
    seq_lens: Tensor  # [B], on the device
    length: int = 0  # the same number on the host


class QuestLayer(StaticLayer):  # type: ignore[misc]
    """One layer's keys and values [B, Hkv, L, D], its page bounds, and its length."""

    # Compiled decoding is not supported yet, and generate() would compile a compileable cache of itself on a GPU.
    is_compileable = False
    is_croppable = True

    def __init__(self, layer: int, max_cache_len: int, settings: _Settings) -> None:
        super().__init__(max_cache_len=max_cache_len)
        self.layer = layer
        self.settings = settings
        self.pages: _LayerPages

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        _check_states(key_states, value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads, _, self.k_head_dim = key_states.shape
        self.v_head_dim = value_states.shape[-1]
        shape = (self.batch_size, self.num_heads, self.max_cache_len, self.k_head_dim)
        # Normal tensors even where the first step runs under inference_mode: a later step may not.
        with torch.inference_mode(False):
            k = torch.zeros(shape, dtype=self.dtype, device=self.device)
            v = torch.zeros_like(k)
            view = page_view_bhld(k, v, self.settings.config.page_size)
            seq_lens = torch.zeros(self.batch_size, dtype=torch.int32, device=self.device)
            self.pages = _LayerPages(self.layer, self.settings, *view, empty_bounds(view), seq_lens)
            self.cumulative_length = torch.zeros((), dtype=torch.int64, device=self.device)
            self.keys, self.values = k, v
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Append [B, Hkv, T, D] new keys and values; returns all that are there, [B, Hkv, tokens, D] each."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, tokens = key_states.shape[0], key_states.shape[2]
        if batch != self.batch_size:
            raise ValueError(f"this QuestCache was made for a batch of {self.batch_size}, got {batch} sequences")
        pages = self.pages
        if pages.length + tokens > self.max_cache_len:
            raise ValueError(
                f"this QuestCache holds {self.max_cache_len} tokens, {pages.length} of them taken, and was given "
                f"{tokens} more: make max_tokens larger"
            )
        k, v = key_states.transpose(1, 2), value_states.transpose(1, 2)
        append_kv(k, v, pages.k, pages.v, pages.bounds, pages.page_table, pages.seq_lens)
        self._add_to_length(tokens)
        keys, values = self.keys[:, :, : pages.length], self.values[:, :, : pages.length]
        keys._quest = pages  # type: ignore[attr-defined]
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # As many as update() will return.
        return (self.pages.length if self.is_initialized else 0) + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens (a negative number, as everywhere in transformers)."""
        if tokens_to_remove > 0:
            raise ValueError(f"tokens_to_remove must be negative or 0, got {tokens_to_remove}")
        if not self.is_initialized or tokens_to_remove == 0:
            return
        if -tokens_to_remove > self.pages.length:
            raise ValueError(f"cannot remove {-tokens_to_remove} tokens from a cache of {self.pages.length}")
        self._add_to_length(tokens_to_remove)
        pages = self.pages
        if pages.length % self.settings.config.page_size:
            # The last page has lost tokens: its bounds must forget them too.
            update_bounds(pages.k, pages.bounds, pages.page_table, pages.seq_lens, pages.seq_lens - 1)

    def reset(self) -> None:
        """Forget everything; the storage stays."""
        if self.is_initialized:
            self._add_to_length(-self.pages.length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise NotImplementedError("QuestCache does not support beam search yet: generate with num_beams=1")

    def _add_to_length(self, tokens: int) -> None:
        self.pages.length += tokens
        self.pages.seq_lens.add_(tokens)
        self.cumulative_length.add_(tokens)


class QuestCache(Cache):  # type: ignore[misc]
    """A static cache whose pages know the bounds of their keys; pass it as ``past_key_values``.

    Costs KV memory plus ``1 / page_size`` of it. The attention reads it sparsely where the model's implementation is
    "quest" (``model.set_attn_implementation("quest")``, or :func:`enable_quest`).

    Args:
        model_config: the model's ``config``.
        quest_config: budget, page size and the rest of the selection.
        max_tokens: prompt and answer together; rounded up to whole pages.
        batch_size: 1.
        dtype, device: allocate now, for keys and values of this kind; else at the first step, from what comes.

    Raises:
        ValueError: for a model or a number that is not supported, naming it.
    """

    def __init__(
        self,
        model_config: Any,
        quest_config: QuestConfig | None = None,
        *,
        max_tokens: int,
        batch_size: int = 1,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        quest_config = quest_config or QuestConfig()
        text_config = model_config.get_text_config(decoder=True)
        layer_types, _ = get_layer_types_and_kwargs(text_config)
        head_dim = getattr(text_config, "head_dim", None) or (
            text_config.hidden_size // text_config.num_attention_heads
        )
        _check_model(layer_types, head_dim)
        if batch_size != 1:
            raise ValueError(f"batch_size must be 1, more is not supported yet, got {batch_size}")
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        page_size = quest_config.page_size
        capacity = -(-max_tokens // page_size) * page_size
        self._settings = _Settings(quest_config)
        super().__init__(layers=[QuestLayer(i, capacity, self._settings) for i in range(len(layer_types))])
        if dtype is not None or device is not None:
            self.early_initialization(
                batch_size,
                text_config.num_key_value_heads,
                head_dim,
                dtype or torch.get_default_dtype(),
                torch.device(device or "cpu"),
            )

    @property
    def quest_config(self) -> QuestConfig:
        """The configuration in use; may be replaced between steps by one of the same page size."""
        return self._settings.config

    @quest_config.setter
    def quest_config(self, config: QuestConfig) -> None:
        if config.page_size != self.quest_config.page_size:
            raise ValueError(
                f"page_size of a cache cannot change: it was made with {self.quest_config.page_size}, "
                f"got {config.page_size}"
            )
        self._settings.config = config

    @property
    def observer(self) -> Observer | None:
        """A function that is told of each layer's reading in each decoding step; None costs nothing."""
        return self._settings.observer

    @observer.setter
    def observer(self, observer: Observer | None) -> None:
        self._settings.observer = observer


def enable_quest(model: Any, quest_config: QuestConfig | None = None, *, max_tokens: int) -> QuestCache:
    """Switch ``model`` to the attention "quest" and make a cache for it, in one call.

    Args:
        model: a transformers model, Llama or Qwen3.
        quest_config: budget, page size and the rest of the selection.
        max_tokens: prompt and answer together.

    Returns:
        An empty cache, to be passed as ``past_key_values``; ``reset()`` makes it ready for another prompt.
    """
    cache = QuestCache(model.config, quest_config, max_tokens=max_tokens)
    model.set_attn_implementation(IMPLEMENTATION)
    if model.config._attn_implementation != IMPLEMENTATION:
        raise ValueError(f"{type(model).__name__} does not let its attention implementation be set")
    return cache


def quest_attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function "quest": query [B, Hq, T, D], key and value as the cache returned them -> [B, T, Hq, D].

    Steps of more than 8 tokens, and keys that come from no QuestCache, take transformers' own SDPA.
    """
    pages: _LayerPages | None = getattr(key, "_quest", None)
    if pages is None:
        _warn_dense(key.shape[2] - query.shape[2])
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out, None
    for feature in ("sliding_window", "softcap", "s_aux", "position_bias"):
        if kwargs.get(feature) is not None:
            raise ValueError(f"attention 'quest' does not support {feature}, which layer {pages.layer} asks for")
    tokens = query.shape[2]
    _check_mask(attention_mask, tokens, pages.length, query.device)
    if tokens > MAX_DECODE_TOKENS:
        out, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return out, None
    if dropout:
        raise ValueError(f"attention 'quest' is for inference: call model.eval() first, got dropout {dropout}")
    config, q = pages.settings.config, query.transpose(1, 2)
    selected = None
    if pages.layer >= config.dense_layers:
        selected = select_pages(q, pages.bounds, pages.page_table, pages.seq_lens, config, scaling)
    if pages.settings.observer is not None:
        pages.settings.observer(pages.layer, selected, pages.length)
    out, _ = sparse_decode(q, pages.k, pages.v, pages.page_table, pages.seq_lens, selected, scaling)
    return out, None


def _check_model(layer_types: list[str], head_dim: int) -> None:
    for layer, layer_type in enumerate(layer_types):
        if layer_type != "full_attention":
            raise ValueError(
                f"QuestCache supports models whose layers are all full_attention, got {layer_type} in layer {layer}"
            )
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"the model's head_dim must be one of {', '.join(map(str, HEAD_DIMS))}, got {head_dim}")


def _check_states(key_states: Tensor, value_states: Tensor) -> None:
    if key_states.shape[0] != 1:
        raise ValueError(f"QuestCache takes one sequence, more is not supported yet, got {key_states.shape[0]}")
    if key_states.dtype not in DTYPES:
        raise ValueError(f"keys must be float32, float16 or bfloat16, got {key_states.dtype}")
    if key_states.shape[-1] not in HEAD_DIMS or key_states.shape[-1] != value_states.shape[-1]:
        raise ValueError(
            f"keys and values must share a head_dim of {', '.join(map(str, HEAD_DIMS))}, got {key_states.shape[-1]} "
            f"and {value_states.shape[-1]}"
        )


def _check_mask(mask: Tensor | None, tokens: int, length: int, device: torch.device) -> None:
    """Refuse what the sparse path would ignore: a mask must hide the future and nothing else.

    transformers leaves out the mask of a plain causal step where it can, and gives all layers the same tensor, so a
    mask once found plain is marked.
    """
    if mask is None:
        if tokens > MAX_DECODE_TOKENS and tokens != length:
            raise ValueError(f"a step of {tokens} tokens behind {length - tokens} others needs an attention mask")
        return
    if getattr(mask, "_quest_is_causal", False):
        return
    shape = (1, 1, tokens, length)
    causal = torch.ones(shape, dtype=torch.bool, device=device).tril(length - tokens)
    allowed = mask if mask.dtype == torch.bool else mask == 0
    if tuple(mask.shape) != shape or not torch.equal(allowed, causal):
        raise ValueError(
            "attention 'quest' does not support padding or masks of one's own yet: pass one sequence without padding, "
            f"got a mask of shape {tuple(mask.shape)} for {tokens} new tokens of {length}"
        )
    mask._quest_is_causal = True  # type: ignore[attr-defined]


def _warn_dense(past_tokens: int) -> None:
    # A forward pass without a cache is dense by nature; one that continues a cache was meant to be sparse.
    if past_tokens:
        warnings.warn(
            "attention 'quest' runs densely because the keys come from another cache: pass "
            "past_key_values=quest_ops.transformers.QuestCache(...)",
            stacklevel=3,
        )


AttentionInterface.register(IMPLEMENTATION, quest_attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
