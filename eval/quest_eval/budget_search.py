"""A budget for each layer: the fewest bytes whose loss on a text stays within a limit.

The attention mass that a layer keeps with each budget is cheap to measure for all layers at once, and guides the
search. The loss on the text decides, since no threshold of the mass says which layers matter. Two stages share a number
of evaluations.

1. One threshold for all layers: each takes its smallest budget with that mass. Bisection finds the lowest threshold
   within the limit.
2. Groups of layers: those that lose least mass for the bytes they save take their next smaller budget, half of the
   layers at first. A group that breaks the limit is halved, and a layer that breaks it alone stays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """A budget that a layer may have.

    Attributes:
        budget: tokens; 0 for dense attention.
        mass: the share of dense attention's weights that it keeps.
        bytes: that the layer then reads in a step.
    """

    budget: int
    mass: float
    bytes: float


@dataclass(frozen=True)
class Trial:
    """An evaluation of a budget for each layer.

    Attributes:
        budgets: of the layers.
        bytes: that they read in a step, the sum over layers.
        loss: perplexity over dense attention's.
        accepted: whether it is within the limit.
    """

    budgets: tuple[int, ...]
    bytes: float
    loss: float
    accepted: bool


def search(
    layers: Sequence[Sequence[Choice]],
    loss: Callable[[tuple[int, ...]], float],
    limit: float,
    evaluations: int,
    known: Mapping[tuple[int, ...], float] | None = None,
) -> tuple[tuple[int, ...], list[Trial]]:
    """The budgets that read fewest bytes of those found within the limit, and all trials in order.

    Args:
        layers: the choices of each layer, from the fewest bytes on. The last one is dense attention, which is within
            the limit by definition.
        loss: of a budget for each layer, as in :class:`Trial`.
        limit: the most loss.
        evaluations: the most calls of ``loss``.
        known: losses that were measured before, by their budgets.
    """
    dense = [len(choices) - 1 for choices in layers]
    places_of = [{choice.budget: place for place, choice in enumerate(choices)} for choices in layers]
    trials: list[Trial] = []

    def note(budgets: tuple[int, ...], value: float) -> Trial:
        chosen = (choices[places[budget]] for choices, places, budget in zip(layers, places_of, budgets, strict=True))
        trials.append(Trial(budgets, sum(choice.bytes for choice in chosen), value, value <= limit))
        return trials[-1]

    for budgets, value in (known or {}).items():
        note(budgets, value)
    evaluations += len(trials)

    def within(places: Sequence[int]) -> bool:
        budgets = tuple(choices[place].budget for choices, place in zip(layers, places, strict=True))
        seen = next((trial for trial in trials if trial.budgets == budgets), None)
        return (seen or note(budgets, loss(budgets))).accepted

    # Two thresholds without a mass between them give the same budgets.
    masses = sorted({choice.mass for choices in layers for choice in choices[:-1]})
    low, high = 0, len(masses)  # the answer is from low to high, where the last one stands for dense attention
    while low < high and len(trials) < evaluations:
        middle = (low + high) // 2
        if within([_first_of_mass(choices, masses[middle]) for choices in layers]):
            high = middle
        else:
            low = middle + 1

    best = min((trial for trial in trials if trial.accepted), key=lambda trial: trial.bytes, default=None)
    places = dense if best is None else [places_of[i][budget] for i, budget in enumerate(best.budgets)]
    fixed: set[int] = set()
    size = max(1, len(layers) // 2)
    while len(trials) < evaluations:
        movable = [i for i, place in enumerate(places) if place > 0 and i not in fixed]
        if not movable:
            break
        group = sorted(movable, key=lambda i: _price(layers[i], places[i]))[:size]
        found = [place - (i in group) for i, place in enumerate(places)]
        if within(found):
            places = found
        elif len(group) == 1:
            fixed.update(group)
        else:
            size = len(group) // 2
    return tuple(choices[place].budget for choices, place in zip(layers, places, strict=True)), trials


def _first_of_mass(choices: Sequence[Choice], least: float) -> int:
    """The place of the smallest budget that keeps this mass."""
    return next((place for place, choice in enumerate(choices[:-1]) if choice.mass >= least), len(choices) - 1)


def _price(choices: Sequence[Choice], place: int) -> float:
    """The mass that a layer loses by its next smaller budget, for each byte that this saves."""
    now, smaller = choices[place], choices[place - 1]
    return (now.mass - smaller.mass) / (now.bytes - smaller.bytes)
