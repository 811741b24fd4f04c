"""QuestCache, the cache of the attention "quest", and ``enable_quest``, which sets up both."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, CacheLayerMixin, get_layer_types_and_kwargs

from ..attention import QuestConfig
from ..ops import HEAD_DIMS, check_choice
from ..report import LayerPlan, Report
from ._say import say_once
from .hybrid import PagedLayerWithState, SlidingLayerWithState, check_croppable, plan_without_keys
from .layer import QuestCacheLayer, Settings
from .paged import Observer, PagedLayer
from .sliding import SlidingLayer
from .trial import TRIAL_CONFIG, TRIAL_TOKENS, check_runs

#: The name under which transformers knows this attention.
IMPLEMENTATION = "quest"


class QuestCache(Cache):  # type: ignore[misc]
    """A static cache with page bounds; pass it as ``past_key_values``.

    Only the attention "quest" can read it: call ``model.set_attn_implementation("quest")``, or :func:`enable_quest`.
    Rows of a batch may be padded on the left. Padding is not stored, so it never shifts pages, but it counts in
    ``max_tokens`` like any other column of the input.

    A full-attention layer holds keys and values of ``max_tokens`` tokens. Its bounds take ``1 / page_size`` of that
    with ``QuestConfig(bounds="cache")``, and about half of it with "int8" and 16-bit keys. A sliding layer holds its
    window and 129 tokens more.

    Args:
        model_config: the model's ``config``.
        quest_config: budget, page size and the rest of the selection.
        max_tokens: tokens of prompt and answer together; rounded up to whole pages.
        batch_size, dtype, device: with any of them, allocate now: for ``batch_size`` sequences (1). Otherwise the first
            step allocates, after its keys. Compiled prefill needs a cache that is allocated.

    Raises:
        ValueError: a model or a number that is not supported; the error names it.
    """

    def __init__(
        self,
        model_config: Any,
        quest_config: QuestConfig | None = None,
        *,
        max_tokens: int,
        batch_size: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        quest_config = quest_config or QuestConfig()
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        capacity = -(-max_tokens // quest_config.page_size) * quest_config.page_size
        text_config = model_config.get_text_config(decoder=True)
        self._settings = Settings(quest_config)
        layers = _make_layers(text_config, capacity, self._settings)
        heads, head_dim = _heads(text_config, layers)
        super().__init__(layers=layers)
        self._settings.num_layers = len(self.layers)
        self._say_plan()
        if not (batch_size is None and dtype is None and device is None):
            self.early_initialization(
                batch_size or 1,
                heads,
                head_dim,
                dtype or torch.get_default_dtype(),
                torch.device(device or "cpu"),
            )

    def plan(self) -> list[LayerPlan]:
        """How each layer decodes, sparse or dense, and why.

        Features that only the model's attention calls show, such as logit soft-capping, are known after a first step.
        """
        return [
            layer.plan() if isinstance(layer, QuestCacheLayer) else plan_without_keys(index, layer)
            for index, layer in enumerate(self.layers)
        ]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens of each row. The number is negative, as in transformers.

        Raises:
            ValueError: more tokens than there are, or a layer whose state cannot go back. Nothing has changed then.
        """
        if tokens_to_remove:
            check_croppable(self.layers)
        super().crop(tokens_to_remove)

    def start_report(self) -> None:
        """Count from now on the pages that each layer reads. Call it before compiling. See :mod:`quest_ops.report`."""
        self._settings.counting, self._settings.counts = True, None
        for layer in self.layers:
            if isinstance(layer, QuestCacheLayer) and layer.is_initialized:
                self._settings.begin_counting(layer.num_heads, layer.k_head_dim, layer.dtype, layer.device)

    def stop_report(self) -> None:
        """Count no more."""
        self._settings.counting, self._settings.counts = False, None

    def report(self) -> Report:
        """The pages and bytes that each layer read since ``start_report()``. Synchronises; prints as a table.

        Sliding layers have no pages, so only their steps are counted. Padding columns of decoding steps are not read.

        Raises:
            RuntimeError: nothing was counted.
        """
        if self._settings.counts is None:
            raise RuntimeError("the cache has counted nothing: call cache.start_report() before the steps to report")
        return self._settings.counts.read(self.plan())

    @property
    def quest_config(self) -> QuestConfig:
        """The configuration in use. Another of the same page size and bounds may replace it between steps."""
        return self._settings.config

    @quest_config.setter
    def quest_config(self, config: QuestConfig) -> None:
        for name in ("page_size", "bounds"):
            made_with, got = getattr(self.quest_config, name), getattr(config, name)
            if got != made_with:
                raise ValueError(f"{name} of a cache cannot change: it was made with {made_with}, got {got}")
        self._settings.config = config

    @property
    def observer(self) -> Observer | None:
        """A function that is called in eager mode in each decoding step of each paged layer; or None."""
        return self._settings.observer

    @observer.setter
    def observer(self, observer: Observer | None) -> None:
        self._settings.observer = observer

    def _say_plan(self) -> None:
        plan = self.plan()
        windows = {layer.window for layer in self.layers if isinstance(layer, SlidingLayer)}
        for window in sorted(windows):
            reason = f"sliding window of {window} tokens"
            layers = [entry.layer for entry in plan if entry.reason == reason]
            say_once(f"attention 'quest' runs dense in {len(layers)} of {len(plan)} layers, which have a {reason}")
        if not any(entry.path == "sparse" for entry in plan):
            reasons = "; ".join(dict.fromkeys(entry.reason for entry in plan))
            say_once(f"attention 'quest' reads no layer of this model sparsely: {reasons}")


def enable_quest(
    model: Any, quest_config: QuestConfig | None = None, *, max_tokens: int, batch_size: int | None = None
) -> QuestCache:
    """Switch ``model`` to the attention "quest" and make a cache for it.

    Two short steps try the model: :mod:`quest_ops.transformers.trial`.

    Args:
        model: a transformers model.
        quest_config: budget, page size and the rest of the selection.
        max_tokens: tokens of prompt and answer together.
        batch_size: allocate the cache now, for this number of sequences; None: at the first step.

    Returns:
        An empty cache, to be passed as ``past_key_values``. ``reset()`` empties it for another prompt.

    Raises:
        ValueError: a model or a number that is not supported; the error names it.
    """
    kind = {} if batch_size is None else {"dtype": model.dtype, "device": model.device}
    cache = QuestCache(model.config, quest_config, max_tokens=max_tokens, batch_size=batch_size, **kind)
    model.set_attn_implementation(IMPLEMENTATION)
    if model.config.get_text_config(decoder=True)._attn_implementation != IMPLEMENTATION:
        raise ValueError(f"{type(model).__name__} does not let its attention implementation be set")
    check_runs(model, QuestCache(model.config, TRIAL_CONFIG, max_tokens=TRIAL_TOKENS))
    return cache


def _make_layers(text_config: Any, max_tokens: int, settings: Settings) -> list[Any]:
    """The layers of a cache, each for the kind of its layer in the model."""
    try:
        kinds, arguments = get_layer_types_and_kwargs(text_config)
    except AttributeError as error:  # no number of layers, or no window: transformers has no cache for it either
        raise ValueError(f"the configuration of {text_config.model_type} does not tell its layers: {error}") from error
    sharing = getattr(text_config, "kv_sharing_modes", None) or ()
    layers: list[Any] = []
    for index, kind in enumerate(kinds):
        # Arguments for all layers, or in later versions of transformers a list with those of each.
        options = dict(arguments if isinstance(arguments, dict) else arguments[index])
        window: Any = options.get("sliding_window")
        states = options.get("number_of_states", 1)
        if kind == "full_attention":
            layers.append(PagedLayer(index, max_tokens, settings))
        elif kind == "sliding_attention":
            layers.append(SlidingLayer(index, max_tokens, settings, window))
        elif kind == "hybrid":
            layers.append(PagedLayerWithState(index, max_tokens, settings, states))
        elif kind == "hybrid_sliding":
            layers.append(SlidingLayerWithState(index, max_tokens, settings, window, states))
        elif kind != "dummy" or "reuse" not in sharing:
            layers.append(_without_keys(index, kind, options))
        else:
            raise ValueError(f"QuestCache supports no layer that attends to the keys of another one, as layer {index}")
    if not any(isinstance(layer, QuestCacheLayer) for layer in layers):
        raise ValueError(f"a QuestCache serves layers of attention, and {text_config.model_type} has none")
    return layers


def _without_keys(index: int, kind: str, options: dict[str, Any]) -> Any:
    """The layer of transformers' own for a kind that keeps no keys."""
    layer_class = STATIC_LAYER_TYPE_MAPPING.get(kind)
    if layer_class is None or issubclass(layer_class, CacheLayerMixin):
        raise ValueError(
            f"QuestCache supports layers of full_attention and sliding_attention, beside a state or not, and layers "
            f"without keys, got {kind} in layer {index}"
        )
    return layer_class(**{name: value for name, value in options.items() if name == "number_of_states"})


def _heads(text_config: Any, layers: list[Any]) -> tuple[int, int]:
    """The number of KV heads and the head_dim of the layers that keep keys."""
    configs = getattr(text_config, "per_layer_config", None) or [text_config] * len(layers)
    found = set()
    for config, layer in zip(configs, layers, strict=False):
        if isinstance(layer, QuestCacheLayer):
            query_heads = getattr(config, "num_attention_heads", None)
            if query_heads is None:
                raise ValueError(f"a QuestCache serves layers of attention, and {text_config.model_type} has none")
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // query_heads
            found.add((getattr(config, "num_key_value_heads", None) or query_heads, head_dim))
    if len(found) > 1:
        pairs = ", ".join(f"{heads} of {head_dim}" for heads, head_dim in sorted(found))
        raise ValueError(f"the layers of a QuestCache must have the same KV heads and head_dim, got {pairs}")
    if any(isinstance(layer, PagedLayer) for layer in layers):
        check_choice("the model's head_dim", head_dim, HEAD_DIMS)
    return found.pop()
