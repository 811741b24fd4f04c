"""QuestCache, the cache of the attention "quest", and ``enable_quest`` and ``disable_quest``, which set up both."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import STATIC_LAYER_TYPE_MAPPING, CacheLayerMixin

from ..config import QuestConfig
from ..report import LayerPlan, Report
from ._say import say_once
from .generation import Generation, install, uninstall
from .hybrid import PagedLayerWithState, SlidingLayerWithState, check_croppable, plan_without_keys
from .layer import QuestCacheLayer, Settings
from .paged import Observer, PagedLayer
from .sliding import SlidingLayer
from .supported import check_model, layer_kinds
from .trial import TRIAL_CONFIG, TRIAL_TOKENS, check_runs

#: The name under which transformers knows this attention.
IMPLEMENTATION = "quest"


class QuestCache(Cache):  # type: ignore[misc]
    """A static cache with page bounds; pass it as ``cache``, or as ``past_key_values`` before transformers 5.24.

    Only the attention "quest" can read it: call ``model.set_attn_implementation("quest")``, or :func:`enable_quest`.
    Rows of a batch may be padded on the left. Padding is not stored, so it never shifts pages, but it counts in
    ``max_tokens`` like any other column of the input.

    A full-attention layer holds keys and values of ``max_tokens`` tokens. Its bounds take ``1 / page_size`` of that
    with ``QuestConfig(bounds="cache")``, and about half of it with "int8" and 16-bit keys. A sliding layer holds its
    window and 129 tokens more.

    Args:
        model_config: the model's ``config``.
        quest_config: budget, page size and the rest of the selection. A list of budgets has one for each layer of the
            model; those of layers without full attention have no effect.
        max_tokens: tokens of prompt and answer together; rounded up to whole pages.
        batch_size, dtype, device: with any of them, allocate now: for ``batch_size`` sequences (1). Otherwise the first
            step allocates, after its keys. Compiled prefill needs a cache that is allocated.

    Raises:
        ValueError: a model or a number that is not supported; the error names it.
    """

    layers: list[Any]

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
        text_config = model_config.get_text_config(decoder=True)
        self._settings = Settings(quest_config, quest_config.candidates > 0, quest_config.kept_pages)
        self._text_config = text_config
        self._prompt: Tensor | None = None  # the sequences of the last generate()
        self._replaced: str | None = None
        self._shares = False  # whether the layers share their lengths
        layers = _make_layers(text_config, self._capacity(max_tokens), self._settings)
        quest_config.check_num_layers(len(layers))
        shapes = check_model(model_config, layer_kinds(text_config)[0])
        super().__init__(layers=layers)
        self._settings.num_layers = len(self.layers)
        self._say_plan()
        if not (batch_size is None and dtype is None and device is None):
            self.early_initialization(
                batch_size or 1,
                [heads for heads, _ in shapes],
                [head_dim for _, head_dim in shapes],
                dtype or torch.get_default_dtype(),
                torch.device(device or "cpu"),
            )

    def plan(self) -> list[LayerPlan]:
        """How each layer decodes, sparse or dense, and why.

        Features that only the model's attention calls show, such as logit soft-capping, are known after a first step.
        After a ``generate`` that replaced this cache by another one, every layer is dense.
        """
        plan = [
            layer.plan() if isinstance(layer, QuestCacheLayer) else plan_without_keys(index, layer)
            for index, layer in enumerate(self.layers)
        ]
        if self._replaced is not None:
            return [x if x.path == "none" else LayerPlan(x.layer, "dense", self._replaced) for x in plan]
        return plan

    def reset(self) -> None:
        """Forget everything; the memory stays."""
        self._prompt = self._replaced = None
        super().reset()

    def prepare(self, batch_size: int, max_tokens: int) -> None:
        """Empty the cache for ``batch_size`` sequences of ``max_tokens`` tokens.

        The memory stays where it fits. Otherwise it goes, and the next step allocates.
        """
        held = [layer for layer in self.layers if isinstance(layer, QuestCacheLayer) and layer.is_initialized]
        if held and held[0].batch_size == batch_size and held[0].max_cache_len >= max_tokens:
            return self.reset()
        self._prompt = self._replaced = None
        self._shares = False
        self.layers = []  # before the new ones: both need not lie in memory
        self.layers = _make_layers(self._text_config, self._capacity(max_tokens), self._settings)
        return None

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, which calls it before the layers of each step."""
        if not torch.compiler.is_compiling():
            self._share_lengths()
        return super().get_mask_sizes(*args, **kwargs)

    def _share_lengths(self) -> None:
        """Let the layers of each device share their lengths, once all hold the same tokens.

        So a step moves them once, not in a few kernels of each layer.

        Raises:
            RuntimeError: layers that share their lengths have taken different steps, by the host's count.
        """
        layers = [layer for layer in self.layers if isinstance(layer, QuestCacheLayer)]
        if not all(layer.has_counted for layer in layers):
            return
        columns = [layer.columns for layer in layers]
        if self._shares and len(set(columns)) > 1:
            raise RuntimeError(
                f"the layers of this QuestCache hold {min(columns)} to {max(columns)} tokens, since a step ended "
                "before its last layer: call cache.reset()"
            )
        if not self._shares and len(set(columns)) == 1 and columns[0] > 0:
            last = {layer.device: layer for layer in layers}
            for layer in layers:
                layer.share(last[layer.device])
            self._shares = True

    def check_prompt(self, ids: Tensor | None, embeds: Tensor | None, attention_mask: Tensor | None) -> None:
        """Refuse a prompt that does not continue the tokens of this cache. Synchronises if it holds any.

        Args:
            ids: int64 [B, L], the whole sequence, or the new tokens where the mask covers all; None: embeddings.
            embeds: [B, L, hidden size], or None.
            attention_mask: [B, L], or None.

        Raises:
            ValueError: the prompt ends before the held tokens do, or differs from those of the last ``generate``.
        """
        held, before = self._held(), self._prompt
        given = ids if ids is not None else embeds
        if given is None:
            return
        new, columns = given.shape[1], (given if attention_mask is None else attention_mask).shape[1]
        whole = columns == new
        if held and (columns <= held or not (whole or columns == held + new)):
            raise ValueError(
                f"this QuestCache holds {held} tokens, which a prompt of {columns} does not continue: "
                "call cache.reset() before another prompt"
            )
        if ids is None or not whole:
            self._prompt = None
            return
        if held and before is not None and before.shape[0] % ids.shape[0] == 0:
            known = min(held, before.shape[1])
            repeats = before.shape[0] // ids.shape[0]
            prompt = ids[:, :known].to(before.device).repeat_interleave(repeats, 0)
            same = prompt == before[:, :known]
            if attention_mask is not None:
                padding = attention_mask[:, :known].to(before.device) == 0
                same = same | padding.repeat_interleave(repeats, 0)
            if not bool(same.all()):
                raise ValueError(
                    f"this QuestCache holds {held} tokens of another prompt: call cache.reset() first, or pass a "
                    "prompt that begins with them"
                )
        self._prompt = ids

    def note_prompt(self, sequences: Tensor) -> None:
        """Note the sequences [B, L] that a ``generate`` over this cache returned."""
        if self._prompt is not None:
            self._prompt = sequences[:, : self._held()]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens of each row. The number is negative, as in transformers.

        Raises:
            ValueError: more tokens than there are, or a layer whose state cannot go back, which changes nothing.
        """
        if tokens_to_remove:
            check_croppable(self.layers)
        super().crop(tokens_to_remove)
        if self._prompt is not None:
            self._prompt = self._prompt[:, : self._held()]

    def note_replaced(self, reason: str) -> None:
        """Note that the model uses another cache, so that :meth:`plan` says so."""
        if self._replaced is None:
            say_once(f"attention 'quest' runs dense: {reason}")
            self._replaced = reason

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
        for name in ("page_size", "bounds", "std_factor"):
            made_with, got = getattr(self.quest_config, name), getattr(config, name)
            if got != made_with:
                raise ValueError(f"{name} of a cache cannot change: it was made with {made_with}, got {got}")
        if config.candidates and not self._settings.codes:
            raise ValueError(f"candidates of a cache made without them must be 0, got {config.candidates}")
        if config.kept_pages > self._settings.kept_pages:
            raise ValueError(
                f"reselect_every of a cache that keeps lists of {self._settings.kept_pages} pages must be 1, "
                f"got {config.reselect_every} with {config.kept_pages} pages"
            )
        config.check_num_layers(self._settings.num_layers)
        self._settings.config = config

    @property
    def observer(self) -> Observer | None:
        """A function that is called in eager mode in each decoding step of each paged layer; or None."""
        return self._settings.observer

    @observer.setter
    def observer(self, observer: Observer | None) -> None:
        self._settings.observer = observer

    def _held(self) -> int:
        """Columns in the cache."""
        return next((layer.columns for layer in self.layers if isinstance(layer, QuestCacheLayer)), 0)

    def _capacity(self, max_tokens: int) -> int:
        page_size = self._settings.config.page_size
        return -(-max_tokens // page_size) * page_size

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
    model: Any, quest_config: QuestConfig | None = None, *, max_tokens: int | None = None, batch_size: int | None = None
) -> QuestCache:
    """Switch ``model`` to the attention "quest", and make a cache for it.

    A later ``model.generate`` without a cache empties the returned cache and uses it, so each call starts anew. With
    the cache passed it goes on where the cache ends. :func:`disable_quest` undoes all of it.

    Two short steps try the model: :mod:`quest_ops.transformers.trial`.

    Args:
        model: a transformers model.
        quest_config: budget, page size and the rest of the selection.
        max_tokens: tokens of prompt and answer together. None: each ``generate`` without a cache makes room for its
            prompt and answer, and keeps the memory for calls that need no more. A cache that is passed has room for the
            model's ``max_position_embeddings``, or for the last such call.
        batch_size: allocate the cache now, for this number of sequences; None: at the first step.

    Returns:
        An empty cache, with the plan and the report of these calls.

    Raises:
        ValueError: a model or a number that is not supported; the error names it.
    """
    kind = {} if batch_size is None else {"dtype": model.dtype, "device": model.device}
    tokens, config = max_tokens, model.config
    if tokens is None:
        tokens = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
        if tokens is None:
            raise ValueError(f"{type(model).__name__} has no max_position_embeddings: pass max_tokens")
    make_cache = functools.partial(QuestCache, config, quest_config, max_tokens=tokens)
    cache = make_cache(batch_size=batch_size, **kind)
    parts = {name: getattr(getattr(config, name, None), "_attn_implementation", None) for name in config.sub_configs}
    restores = {name: implementation for name, implementation in parts.items() if implementation is not None}
    restores[""] = config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION)
    if config.get_text_config(decoder=True)._attn_implementation != IMPLEMENTATION:
        raise ValueError(f"{type(model).__name__} does not let its attention implementation be set")
    try:
        check_runs(model, QuestCache(config, TRIAL_CONFIG, max_tokens=TRIAL_TOKENS))
    except ValueError:
        model.set_attn_implementation(restores)
        raise
    install(model, Generation(make_cache, max_tokens, IMPLEMENTATION, restores), cache)
    return cache


def disable_quest(model: Any) -> None:
    """Undo :func:`enable_quest`: the attention and ``generate`` of ``model`` are as before it.

    Raises:
        ValueError: the model is not under ``enable_quest``.
    """
    state = uninstall(model)
    if state is None:
        raise ValueError(f"this {type(model).__name__} is not under enable_quest")
    model.set_attn_implementation(state.restores)


def _make_layers(text_config: Any, max_tokens: int, settings: Settings) -> list[Any]:
    """The layers of a cache, each for the kind of its layer in the model."""
    kinds, arguments = layer_kinds(text_config)
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
