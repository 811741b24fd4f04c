"""QuestConfig: how Quest selects pages, for all layers or for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import ClassVar, NamedTuple, TypeGuard, get_args

from torch import Tensor

from . import config_file
from .bounds import BoundsKind, check_std_factor
from .ops import PAGE_SIZES, GroupReduce, check_choice, check_whole

# First layers that are dense where no budget list says which are.
_DENSE_LAYERS = 2


class LayerPages(NamedTuple):
    """The pages of a layer, as a selector gets them.

    Attributes:
        k_cache, v_cache: [N, Hkv, S, D], the step's tokens included.
        k_bounds: [N, Hkv, 2, D], or [N, Hkv, 2, D / 2] of 4 bits.
        k_scales: [N, Hkv] float32, or None where the bounds have the cache's dtype.
        page_table: [B, P] int32.
        seq_lens: [B] int32, the step's tokens included.
        scale: the attention's softmax scale.
    """

    k_cache: Tensor
    v_cache: Tensor
    k_bounds: Tensor
    k_scales: Tensor | None
    page_table: Tensor
    seq_lens: Tensor
    scale: float


#: Chooses the pages of a sparse layer in place of Quest: ``selector(layer, q, pages, config)``, with the layer's index,
#: q [B, T, Hq, D], its :class:`LayerPages` and its configuration, ``QuestConfig.at(layer)``. It returns one of two
#: tensors. Logical pages, int32 [B, T, Hs, K] with any K, are read as :func:`quest_ops.sparse_decode` takes them.
#: Scores of all pages, float32 [B, T, Hq, P], go to :func:`quest_ops.topk_pages`, which keeps those of the budget.
#: In a ragged step each token is a sequence of its own: B is then B * T, and T is 1.
Selector = Callable[[int, Tensor, LayerPages, "QuestConfig"], Tensor]


@dataclass(frozen=True)
class QuestConfig:
    """How Quest selects pages. The defaults are those that keep most on a real model, see docs/evaluation.md.

    The paper's selection is ``QuestConfig(sink_pages=0, bounds="cache", std_factor=None, group_reduce="none")``.

    Args:
        budget: tokens that a head reads, at least a page; rounded down to whole pages. Or a number for each layer of
            the model, each a multiple of ``page_size``, with 0 or None for a dense layer. Kept as a tuple.
        page_size: S, the cache's.
        sink_pages: first pages that are always read, counted in the budget. The first tokens hold much of the attention
            of real models (attention sinks).
        recent_pages: last pages that are always read, counted in the budget; 1 keeps the page being written.
        dense_layers: first layers that read everything, as in the paper; 2 by default. With a list of budgets, which
            names the dense layers itself, 0 and the default.
        group_reduce: how the query heads of a KV head agree on pages: "max", "sum", "soft" or "none". See
            :func:`quest_ops.topk_pages`.
        bounds: how the cache stores a page's bounds.
            "int8" and "int4" are 8 and 4 bits with a scale a page and head.
            "cache" is the cache's dtype.
        std_factor: bounds are ``mean - std_factor * std`` and ``mean + std_factor * std`` of a page's keys (UNIQUE,
            2026); None: their minimum and maximum, as in the paper.
        selector: chooses the pages in place of Quest, as :data:`Selector` says. It must not wait for the device. Dense
            layers, prefills and caches that fit the budget do not call it.
        candidates: tokens of the pages that a first selection keeps; rounded down to whole pages. A second selection
            reads ``budget`` of them. It scores their tokens by keys of 2 bits, which the cache must have
            (:func:`quest_ops.ops.rerank_pages`). Small budgets keep more with it, and a step takes longer. 0: one
            selection.
        reselect_every: a sequence selects pages with the first token of a page, and then with every
            ``reselect_every``-th of the page. In between it reads the pages of the last selection, and the newest
            ``recent_pages``, as in LServe (Yang et al., MLSys 2025). Those steps read no bounds. The cache must have
            room, ``kept_pages=config.kept_pages``. Steps of several tokens or of ragged sequences select, and so does
            the step after them.
        dense_below: a sequence of at most this number of tokens reads all its pages in every layer. The device decides
            for each sequence. Selecting costs more than it saves in a short sequence. 0: the budget alone decides. With
            ``reselect_every`` it is a multiple of page_size.

    Raises:
        ValueError: an argument out of its range.
    """

    budget: int | Sequence[int | None] = 2048
    page_size: int = 16
    sink_pages: int = 1
    recent_pages: int = 1
    dense_layers: int | None = None
    group_reduce: GroupReduce = "max"
    bounds: BoundsKind = "int4"
    std_factor: float | None = 1.0
    selector: Selector | None = None
    dense_below: int = 0
    candidates: int = 0
    reselect_every: int = 1

    # Each layer's configuration where the budget is a list. Made once, so that looking it up costs a step nothing.
    _layers: ClassVar[tuple[QuestConfig, ...]] = ()

    def __post_init__(self) -> None:
        check_choice("page_size", self.page_size, PAGE_SIZES)
        listed = isinstance(self.budget, Sequence) and not isinstance(self.budget, str | bytes)
        if self.dense_layers is None:
            object.__setattr__(self, "dense_layers", 0 if listed else _DENSE_LAYERS)
        for name in ("sink_pages", "recent_pages", "dense_layers", "dense_below", "candidates"):
            check_whole(name, getattr(self, name))
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if listed:
            self._check_list()
        else:
            self._check_budget()
        for name, words in (("group_reduce", GroupReduce), ("bounds", BoundsKind)):
            if getattr(self, name) not in get_args(words):
                raise ValueError(f"{name} must be one of {', '.join(get_args(words))}, got {getattr(self, name)!r}")
        check_std_factor(self.std_factor)
        self._check_candidates()
        self._check_reselect_every()
        if self.selector is not None and not callable(self.selector):
            raise ValueError(f"selector must be a function or None, got {self.selector!r}")
        if isinstance(self.budget, tuple):
            object.__setattr__(self, "_layers", self._split())

    def _check_budget(self) -> None:
        if not _is_whole(self.budget):
            raise ValueError(f"budget must be a whole number, or a list with one for each layer, got {self.budget!r}")
        object.__setattr__(self, "budget", int(self.budget))
        if self._tokens < self.page_size:
            raise ValueError(f"budget must be at least a page, {self.page_size} tokens, got {self.budget}")
        self._check_forced(self._tokens, "the budget")

    def _check_list(self) -> None:
        assert isinstance(self.budget, Sequence)
        if not self.budget:
            raise ValueError("budget must have a number for each layer, got an empty list")
        if self.dense_layers != 0:
            raise ValueError(
                f"dense_layers must be 0 or left out with a list of budgets, in which 0 marks a dense layer, "
                f"got {self.dense_layers}"
            )
        budgets = [0 if number is None else number for number in self.budget]
        for layer, number in enumerate(budgets):
            whose = f"budget of layer {layer}"
            if not _is_whole(number):
                raise ValueError(f"{whose} must be a whole number or None, got {number!r}")
            if number < 0 or number % self.page_size:
                raise ValueError(f"{whose} must be 0 or a multiple of page_size, {self.page_size}, got {number}")
            if number:
                self._check_forced(number, f"the {whose}")
        object.__setattr__(self, "budget", tuple(map(int, budgets)))

    def _check_forced(self, tokens: int, whose: str) -> None:
        if self.sink_pages + self.recent_pages > tokens // self.page_size:
            raise ValueError(
                f"sink_pages + recent_pages must be at most the {tokens // self.page_size} pages of {whose}, "
                f"got {self.sink_pages} + {self.recent_pages}"
            )

    def _check_candidates(self) -> None:
        largest = self._largest
        if self.candidates and self.candidates // self.page_size <= largest // self.page_size:
            raise ValueError(f"candidates must be 0 or pages more than the budget, {largest}, got {self.candidates}")
        if self.candidates and self.selector is not None:
            raise ValueError(f"candidates must be 0 with a selector, got {self.candidates}")

    def _check_reselect_every(self) -> None:
        check_whole("reselect_every", self.reselect_every)
        if self.reselect_every < 1:
            raise ValueError(f"reselect_every must be at least 1, got {self.reselect_every}")
        if self.reselect_every == 1:
            return
        for name, allowed in (("selector", None), ("candidates", 0)):
            if getattr(self, name) != allowed:
                raise ValueError(
                    f"{name} must be {allowed} with reselect_every, {self.reselect_every}, got {getattr(self, name)}"
                )
        # A sequence selects with the first token of a page, so it selects in its first step beyond dense_below.
        if self.dense_below % self.page_size:
            raise ValueError(
                f"dense_below must be a multiple of page_size, {self.page_size}, with reselect_every, "
                f"{self.reselect_every}, got {self.dense_below}"
            )
        if self.group_reduce == "none":
            raise ValueError(
                f"group_reduce must be max, sum or soft with reselect_every, {self.reselect_every}, got 'none'"
            )
        if self.recent_pages < 1:
            raise ValueError(
                f"recent_pages must be at least 1 with reselect_every, {self.reselect_every}, got {self.recent_pages}"
            )

    def _split(self) -> tuple[QuestConfig, ...]:
        """The configuration of each layer of a list; layers of one budget share theirs."""
        assert isinstance(self.budget, tuple)
        largest = max(self.budget) or (self.sink_pages + self.recent_pages + 1) * self.page_size
        everything = len(self.budget)
        made = {n: replace(self, budget=n or largest, dense_layers=0 if n else everything) for n in set(self.budget)}
        return tuple(made[number] for number in self.budget)

    def at(self, layer: int) -> QuestConfig:
        """The configuration of one layer, whose budget is a number.

        A dense layer of a list has ``dense_layers`` past all layers, and a budget that nothing reads.

        Raises:
            ValueError: a list of budgets has none for this layer.
        """
        if not self._layers:
            return self
        if not 0 <= layer < len(self._layers):
            raise ValueError(f"layer must be 0 to {len(self._layers) - 1}, as config.budget has it, got {layer}")
        return self._layers[layer]

    def is_dense(self, layer: int) -> bool:
        """Whether a layer is dense by ``dense_layers`` or by a budget of 0."""
        return layer < (self.at(layer).dense_layers or 0)

    def check_num_layers(self, num_layers: int) -> None:
        """Raises ValueError where a list of budgets is for another number of layers."""
        if self._layers and len(self._layers) != num_layers:
            raise ValueError(
                f"config.budget must be a number, or a list with one for each of {num_layers} layers, "
                f"got {len(self._layers)} of them"
            )

    def save(self, path: str | Path, *, model: str | None = None, num_layers: int | None = None) -> None:
        """Write this configuration as JSON, to read, to edit and to :meth:`load`.

        Args:
            path: of the file.
            model: name of the model that it is for.
            num_layers: of that model; a list of budgets has it already.

        Raises:
            ValueError: a selector, which is a function, or a list of budgets for another number of layers.
        """
        config_file.write(path, self, model, num_layers)

    @classmethod
    def load(cls, path: str | Path, *, model: str | None = None, num_layers: int | None = None) -> QuestConfig:
        """The configuration in a file of :meth:`save`.

        Args:
            path: of the file. Fields that it leaves out have their defaults.
            model: name of the model to use it with; None does not compare names.
            num_layers: of that model; None does not compare them. A cache compares a list of budgets in any case.

        Raises:
            ValueError: another model, another version of the format, an unknown key, or a value of a wrong type or out
                of its range. The error names it.
        """
        fields = config_file.read(path, model, num_layers)
        try:
            return cls(**fields)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @property
    def _tokens(self) -> int:
        """The budget, of a configuration with one."""
        if not isinstance(self.budget, int):
            raise ValueError("the budget is a list: use the configuration of one layer, config.at(layer)")
        return self.budget

    @property
    def _largest(self) -> int:
        """The largest budget of a layer."""
        return max(self.budget) if isinstance(self.budget, tuple) else self._tokens

    @property
    def num_pages(self) -> int:
        """Pages of the budget."""
        return self._tokens // self.page_size

    @property
    def most_pages(self) -> int:
        """Pages that the longest list holds: those of the budget, or of a sequence of ``dense_below`` tokens."""
        return max(self.num_pages, -(-self.dense_below // self.page_size))

    @property
    def selection(self) -> tuple[int, GroupReduce, int, int]:
        """num_pages, group_reduce, sink_pages and recent_pages: the selection of :func:`quest_ops.decode_step`."""
        return self.num_pages, self.group_reduce, self.sink_pages, self.recent_pages

    @property
    def is_window(self) -> bool:
        """Whether every page of the budget is forced, as in a recent window, so that no score changes the list."""
        return self.sink_pages + self.recent_pages == self.num_pages

    @property
    def candidate_pages(self) -> int:
        """Pages that the first of two selections keeps; 0 where there is one, or none scores pages."""
        if not self.candidates or self.is_window:
            return 0
        return max(self.candidates // self.page_size, self.most_pages)

    @property
    def kept_pages(self) -> int:
        """Pages of the lists that a cache keeps for ``reselect_every``, over all layers; 0 where each step selects."""
        return 0 if self.reselect_every == 1 else max(self._largest, self.dense_below) // self.page_size

    @property
    def reads_bounds(self) -> bool:
        """Whether Quest scores the pages."""
        return self.selector is None and not self.is_window

    @property
    def in_one_call(self) -> bool:
        """Whether a step is a single :func:`quest_ops.decode_step`."""
        return self.reads_bounds and not self.candidates


def _is_whole(number: object) -> TypeGuard[int]:
    return isinstance(number, Integral) and not isinstance(number, bool)
