"""Generation without a cache in the call: ``generate`` makes, checks and keeps the QuestCache.

``enable_quest`` wraps three methods of one model object; ``disable_quest`` removes the wrappers. They do nothing while
the model has another attention implementation.
"""

from __future__ import annotations

import functools
import inspect
import types
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import GenerationMixin

from ._say import say_once

if TYPE_CHECKING:
    from collections.abc import Callable

    from .cache import QuestCache

_CACHE_NAMES = ("cache", "past_key_values")
#: The name under which transformers passes a cache: "past_key_values" before version 5.24, "cache" since.
CACHE_NAME = next(
    name for name in _CACHE_NAMES if name in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
)

_STATE = "_quest_generation"


@dataclass
class Generation:
    """The state of a model whose ``generate`` uses a QuestCache.

    Attributes:
        make_cache: makes a cache.
        max_tokens: of the cache; None: as each call needs.
        implementation: the name under which transformers knows the attention "quest".
        restores: the attention implementation of each sub-configuration before.
        returned: the cache that ``enable_quest`` returned, which its caller may have let go.
        cache: the cache of calls without one, from the first such call on.
        current: the cache of the call in progress.
    """

    make_cache: Callable[[], QuestCache]
    max_tokens: int | None
    implementation: str
    restores: dict[str, str]
    returned: Callable[[], QuestCache | None] = field(default=lambda: None)
    cache: QuestCache | None = None
    current: Callable[[], QuestCache | None] = field(default=lambda: None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Generation:
        """A copied model gets a cache of its own."""
        return Generation(self.make_cache, self.max_tokens, self.implementation, dict(self.restores))

    def empty_cache(self, batch_size: int, tokens: int) -> QuestCache:
        """An empty cache for a call of ``batch_size`` rows of ``tokens`` tokens."""
        self.cache = self.cache or self.returned() or self.make_cache()
        self.cache.prepare(batch_size, self.max_tokens or tokens)
        return self.cache


def install(model: Any, state: Generation, cache: QuestCache) -> None:
    """Wrap the methods of ``model``, which may have been wrapped before."""
    before = state_of(model)
    if before is not None:
        state.restores = before.restores
    state.returned = weakref.ref(cache)
    setattr(model, _STATE, state)
    for name, wrapper in _WRAPPERS.items():
        method = getattr(type(model), name, None)
        if method is not None:
            # Bound to the object, not closed over it: a deep copy of the model binds it to the copy.
            bound = types.MethodType(functools.wraps(method)(functools.partial(wrapper, method)), model)
            setattr(model, name, bound)


def uninstall(model: Any) -> Generation | None:
    """Remove the wrappers. Returns the state, or None where there were none."""
    state = state_of(model)
    for name in (*_WRAPPERS, _STATE):
        vars(model).pop(name, None)
    return state


def state_of(model: Any) -> Generation | None:
    state: Generation | None = vars(model).get(_STATE)
    return state


def _active(model: Any) -> Generation | None:
    state = state_of(model)
    if state is None or model.config.get_text_config(decoder=True)._attn_implementation != state.implementation:
        return None
    return state


def _quest_cache(cache: Any) -> QuestCache | None:
    from .cache import QuestCache

    return cache if isinstance(cache, QuestCache) else None


def _generate(method: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """``generate``: a prompt over a cache that holds tokens must continue them.

    Both names of the cache serve, under every version of transformers: code need not change with it.
    """
    if _active(model) is None:
        return method(model, *args, **kwargs)
    given = [name for name in _CACHE_NAMES if name in kwargs]
    if len(given) == 1:
        kwargs[CACHE_NAME] = kwargs.pop(given[0])
    cache = _quest_cache(kwargs.get(CACHE_NAME))
    if cache is None:
        return method(model, *args, **kwargs)
    ids = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
    embeds = kwargs.get("inputs_embeds")
    cache.check_prompt(ids if embeds is None else None, embeds, kwargs.get("attention_mask"))
    out = method(model, *args, **kwargs)
    cache.note_prompt(out if isinstance(out, Tensor) else out.sequences)
    return out


def _prepare_cache_for_generation(
    method: Callable[..., Any],
    model: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> Any:
    """The part of ``generate`` that makes a cache where the call has none."""
    state = _active(model)
    asked = generation_config.use_cache is False or generation_config.cache_implementation is not None
    if state is not None and not asked and not generation_config.is_assistant and model_kwargs.get(CACHE_NAME) is None:
        rows = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1) * batch_size
        model_kwargs[CACHE_NAME] = state.empty_cache(rows, max_cache_length)
    if state is not None:
        cache = _quest_cache(model_kwargs.get(CACHE_NAME))
        state.current = (lambda: None) if cache is None else weakref.ref(cache)
    return method(model, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)


def _prepare_inputs_for_generation(
    method: Callable[..., Any], model: Any, input_ids: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """The arguments of a step; a cache that the model drops is emptied and takes the whole sequence again.

    Phi-3 with longrope drops its cache where the sequence outgrows the original context: keys before it have other
    rotations.
    """
    state, given = _active(model), kwargs.get(CACHE_NAME)
    inputs = method(model, input_ids, *args, **kwargs)
    if state is None:
        return inputs
    cache = _quest_cache(given)
    if cache is None:
        current = state.current()
        if current is not None:
            current.note_replaced(f"the model replaced this cache by {type(given).__name__}")
        return inputs
    if inputs.get(CACHE_NAME) is None:
        inputs = method(model, input_ids, *args, **{**kwargs, CACHE_NAME: None, "next_sequence_length": None})
        if int(cache.get_seq_length()) > 0:
            say_once("the model dropped its cache, so the same QuestCache was filled again with the whole sequence")
        cache.reset()
        inputs[CACHE_NAME] = cache
    return inputs


_WRAPPERS: dict[str, Callable[..., Any]] = {
    "generate": _generate,
    "_prepare_cache_for_generation": _prepare_cache_for_generation,
    "prepare_inputs_for_generation": _prepare_inputs_for_generation,
}
