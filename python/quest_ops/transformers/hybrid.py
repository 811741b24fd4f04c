"""Layers of hybrid models, whose state-space, convolution or linear-attention states stay transformers' own.

Such a state has a fixed size, so Quest has nothing to select in it. A layer of these models has a state instead of keys
and values, both of them, or neither.
"""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import LinearAttentionCacheLayerMixin, LinearAttentionLayer

from ..report import LayerPlan
from .layer import Settings
from .paged import PagedLayer
from .sliding import SlidingLayer


def plan_without_keys(index: int, layer: Any) -> LayerPlan:
    """The plan of a layer that keeps no keys."""
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        return LayerPlan(index, "none", "no attention; any state, of a fixed size, is transformers' own")
    return LayerPlan(index, "none", "neither attention nor a state")


class _WithState(LinearAttentionLayer):  # type: ignore[misc]
    """A state of transformers' own beside the keys and values of the next class in the order of inheritance."""

    supports_early_init = True  # of the keys and values; a first step shapes the states

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        # transformers passes keys and values by position, and states by name.
        if args:
            super(LinearAttentionCacheLayerMixin, self).lazy_initialization(*args)
        else:
            super().lazy_initialization(**kwargs)

    def get_max_length(self) -> int:
        return super(LinearAttentionCacheLayerMixin, self).get_max_length()

    def reset(self) -> None:
        super().reset()
        super(LinearAttentionCacheLayerMixin, self).reset()

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        super(LinearAttentionCacheLayerMixin, self).reorder_cache(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        super(LinearAttentionCacheLayerMixin, self).crop(tokens_to_remove)


class PagedLayerWithState(_WithState, PagedLayer):
    """A layer of full attention beside a state."""

    def __init__(self, index: int, max_tokens: int, settings: Settings, number_of_states: int = 1) -> None:
        PagedLayer.__init__(self, index, max_tokens, settings)
        LinearAttentionLayer.__init__(self, number_of_states)


class SlidingLayerWithState(_WithState, SlidingLayer):
    """A layer of sliding-window attention beside a state."""

    def __init__(self, index: int, max_tokens: int, settings: Settings, window: int, number_of_states: int = 1) -> None:
        SlidingLayer.__init__(self, index, max_tokens, settings, window)
        LinearAttentionLayer.__init__(self, number_of_states)


def check_croppable(layers: list[Any]) -> None:
    """Raise where a layer's state cannot go back, before any layer has gone back.

    Raises:
        ValueError: it names the layer.
    """
    for index, layer in enumerate(layers):
        if not isinstance(layer, LinearAttentionCacheLayerMixin):
            continue
        if any(layer.is_recurrent_states_initialized.values()):
            raise ValueError(
                f"this QuestCache cannot be cropped: the recurrent state of layer {index} does not go back"
            )
        if any(layer.is_conv_states_initialized.values()) and not layer.record_past:
            raise ValueError(
                f"the convolution state of layer {index} goes back only if it was recorded: call "
                "cache.activate_past_recording() before the tokens to crop"
            )
