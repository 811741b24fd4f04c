"""The search of a budget for each layer, on losses that are known in closed form."""

import itertools
import math
import random

import pytest

pytest.importorskip("rich")

from quest_eval.budget_search import Choice, search

BUDGETS = (64, 128, 256, 512)


def layers_of(needs):
    """Layers that keep more mass with a larger share of the tokens that they need; dense attention reads 1,024."""
    return [
        [*(Choice(budget, min(1.0, budget / need), budget) for budget in BUDGETS), Choice(0, 1.0, 1024)]
        for need in needs
    ]


def loss_of(needs, calls):
    """Each layer adds to the loss as far as its budget falls short of its need."""

    def loss(budgets):
        calls.append(budgets)
        missing = (max(0, need - (budget or 1024)) / need for need, budget in zip(needs, budgets, strict=True))
        return 1 + 0.01 * sum(missing)

    return loss


def test_each_layer_gets_the_budget_that_it_needs():
    needs, calls = [512, 64, 64, 256, 128, 1024], []
    best, trials = search(layers_of(needs), loss_of(needs, calls), 1.0, 60)
    assert best == (512, 64, 64, 256, 128, 0)
    assert [trial.budgets for trial in trials] == calls
    assert len(set(calls)) == len(calls)


def test_no_evaluation_past_the_limit_and_the_best_so_far_is_kept():
    needs = [random.Random(0).choice(BUDGETS) for _ in range(30)]
    sizes = []
    for evaluations in (1, 4, 12, 40):
        calls = []
        best, trials = search(layers_of(needs), loss_of(needs, calls), 1.01, evaluations)
        assert len(calls) == len(trials) <= evaluations
        within = [trial for trial in trials if trial.accepted]
        assert all(trial.accepted == (trial.loss <= 1.01) for trial in trials)
        assert best == (min(within, key=lambda trial: trial.bytes).budgets if within else (0,) * 30)
        sizes.append(sum(budget or 1024 for budget in best))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] <= sum(needs)


def test_where_the_mass_misleads_the_loss_decides():
    """The first layer loses most mass and no loss, the second the reverse."""
    first = [Choice(64, 0.1, 64), Choice(512, 0.2, 512), Choice(0, 1.0, 1024)]
    second = [Choice(64, 0.98, 64), Choice(512, 0.99, 512), Choice(0, 1.0, 1024)]
    best, _ = search([first, second], lambda budgets: 1.0 if budgets[1] == 0 else 2.0, 1.01, 20)
    assert best == (64, 0)


def test_nothing_within_the_limit_is_dense_attention():
    best, trials = search(layers_of([512] * 4), lambda _: 9.0, 1.01, 20)
    assert best == (0,) * 4
    assert not any(trial.accepted for trial in trials)


def test_known_losses_are_not_measured_again():
    needs, calls = [64, 64, 64], []
    known = {(64, 64, 64): 1.0}
    best, trials = search(layers_of(needs), loss_of(needs, calls), 1.0, 10, known)
    assert (best, calls) == ((64, 64, 64), [])
    assert [trial.budgets for trial in trials] == [(64, 64, 64)]


def test_it_finds_what_trying_all_lists_finds():
    """Where losses add up and mass follows them, no list reads less."""
    needs = [512, 128, 64]
    layers, calls = layers_of(needs), []
    best, _ = search(layers, loss_of(needs, calls), 1.0, 60)
    loss, bytes_of = loss_of(needs, []), {budget: budget or 1024 for budget in (0, *BUDGETS)}
    lists = [x for x in itertools.product((0, *BUDGETS), repeat=3) if loss(x) <= 1.0]
    least = min(sum(bytes_of[budget] for budget in x) for x in lists)
    assert math.isclose(sum(bytes_of[budget] for budget in best), least)
