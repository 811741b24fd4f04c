"""The fuzzer for a bounded time, on fixed seeds, and every case that it has found. `make fuzz` runs it for longer."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from quest_ops import ops
from quest_ops._library import OPERATORS

from .__main__ import REGRESSIONS
from .judge import run
from .plans import MODES, Plan, draw

CASES = int(os.environ.get("QUEST_OPS_FUZZ_CASES", "60"))
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_drawn_cases(device: str, operator: str, mode: str) -> None:
    accepted = 0
    for number in range(CASES):
        plan = draw(f"suite-{number}", operator, mode)
        try:
            accepted += run(plan, device) == "accepted"
        except Exception as error:
            raise AssertionError(f"add to {REGRESSIONS.name}: {json.dumps(plan)}") from error
    assert mode == "valid" or accepted < CASES, "no case was refused"


@pytest.mark.parametrize("plan", json.loads(REGRESSIONS.read_text()), ids=lambda plan: str(plan["seed"]))
def test_found_cases(device: str, plan: Plan) -> None:
    run(plan, device)


KEPT_LISTS = ("kept_lists", "reselect_every")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "missing",
    [
        ("dense_below",),
        (*KEPT_LISTS, "dense_below"),
        ("counters", "earlier_steps", *KEPT_LISTS, "dense_below"),
    ],
    ids=lambda names: names[0],
)
def test_older_plans(device: str, missing: tuple[str, ...], mode: str) -> None:
    """They lack the arguments that an operator has taken since."""
    plan = draw("older", "decode_step", mode)
    run({key: value for key, value in plan.items() if key not in missing}, device)


Operator = Callable[..., Any]


def _results_off(operator: Operator) -> Operator:
    """A first element that is wrong by a few percent."""

    def faulty(*arguments: Any, **named: Any) -> Any:
        results = operator(*arguments, **named)
        first = results[0] if isinstance(results, tuple) else results
        if first is not None and first.numel():
            one = first.view(-1)[:1]
            one.copy_(one * 1.1 + 1)
        return results

    return faulty


def _writes_behind(operator: Operator) -> Operator:
    """Into the memory behind a tensor."""

    def faulty(**named: Any) -> Any:
        results = operator(**named)
        x = named["page_table"]
        if x._base is not None and not isinstance(x, torch._subclasses.FakeTensor):
            x._base[-1] = 5
        return results

    return faulty


def _reads_behind(operator: Operator) -> Operator:
    """A result that depends on the memory behind a tensor."""

    def faulty(*arguments: Any, **named: Any) -> Any:
        results = operator(*arguments, **named)
        x = named.get("page_table")
        if x is not None and x._base is not None and not isinstance(x, torch._subclasses.FakeTensor):
            results.add_(x._base[-1] == 0)
        return results

    return faulty


def _takes_anything(operator: Operator) -> Operator:
    def faulty(**named: Any) -> Any:
        try:
            return operator(**named)
        except RuntimeError:
            return None

    return faulty


def _refuses_without_a_name(operator: Operator) -> Operator:
    def faulty(**named: Any) -> Any:
        try:
            return operator(**named)
        except RuntimeError:
            raise RuntimeError("wrong") from None

    return faulty


def _code_off(operator: Operator) -> Operator:
    """Another code of one element of a key."""

    def faulty(**named: Any) -> Any:
        codes, before = named["k_codes"], named["k_codes"].clone()
        operator(**named)
        if not isinstance(codes, torch._subclasses.FakeTensor):
            for where in (codes != before).nonzero()[-1:].tolist():
                codes[tuple(where)] ^= 2

    return faulty


def _scale_off(operator: Operator) -> Operator:
    """Scales that are wrong by a few roundings of float16."""

    def faulty(**named: Any) -> Any:
        operator(**named)
        named["code_scales"] *= 1.002

    return faulty


def _scores_every_page(operator: Operator) -> Operator:
    def faulty(**named: Any) -> Any:
        pages, count = named["pages"], named["page_table"].shape[1]
        everything = torch.arange(count, dtype=torch.int32, device=pages.device).expand(*pages.shape[:-1], count)
        return operator(**{**named, "pages": everything})

    return faulty


def _leaves_counters_unfit(operator: Operator) -> Operator:
    """For the next step, whose result they change."""

    def faulty(**named: Any) -> Any:
        results, counters = operator(**named), named.get("counters")
        if counters is not None and not isinstance(counters, torch._subclasses.FakeTensor):
            results[0].add_(counters[0])
            counters[0] += 1
        return results

    return faulty


def _counts_refused_calls(operator: Operator) -> Operator:
    def faulty(**named: Any) -> Any:
        try:
            return operator(**named)
        except RuntimeError:
            counters = named.get("counters")
            if isinstance(counters, torch.Tensor) and counters.dtype == torch.int32 and counters.numel():
                counters[0] += 1
            raise

    return faulty


def _takes_few_counters(operator: Operator) -> Operator:
    def faulty(**named: Any) -> Any:
        try:
            return operator(**named)
        except RuntimeError as error:
            if "counters must have at least" not in str(error):
                raise
            return operator(**{**named, "counters": None})

    return faulty


def _real(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and not isinstance(x, torch._subclasses.FakeTensor)


def _always_selects(operator: Operator) -> Operator:
    """In steps that keep their lists too."""

    def faulty(**named: Any) -> Any:
        steps = named.get("kept_steps")
        return operator(**named if steps is None else {**named, "kept_steps": torch.zeros_like(steps)})

    return faulty


def _keeps_the_newest_pages(operator: Operator) -> Operator:
    """Of the step that selected, where the lists must have those of this step."""

    def faulty(**named: Any) -> Any:
        kept = named.get("kept_pages")
        before = kept.clone() if _real(kept) else None
        results = operator(**named)
        if before is not None:
            keeps = named["kept_steps"] % named["reselect_every"] != 0
            kept.copy_(before.where(keeps[:, None, None], kept))
        return results

    return faulty


def _writes_behind_lists(operator: Operator) -> Operator:
    """Into places of kept_pages that belong to no list."""

    def faulty(**named: Any) -> Any:
        results, kept = operator(**named), named.get("kept_pages")
        if _real(kept):
            kept[..., named["num_pages"] :] += 1
        return results

    return faulty


def _takes_any_kept_lists(operator: Operator) -> Operator:
    """Reads its own instead of those that it must refuse."""

    def faulty(**named: Any) -> Any:
        try:
            return operator(**named)
        except RuntimeError as error:
            if "kept_" not in str(error):
                raise
            return operator(**{**named, "kept_pages": None, "kept_steps": None})

    return faulty


def _refuses_kept_numbers(operator: Operator) -> Operator:
    """Where they are no pages."""

    def faulty(**named: Any) -> Any:
        kept = named.get("kept_pages")
        if _real(kept) and bool((kept < -1).any()):
            raise RuntimeError("kept_pages must hold pages")
        return operator(**named)

    return faulty


def _reads_one_page(operator: Operator) -> Operator:
    """Where all are to be read."""

    def faulty(**named: Any) -> Any:
        if named["num_pages"] != 0:
            return operator(**named)
        forced = {"sink_pages": 0, "recent_pages": 1, "dense_below": 0}
        out, lse, pages = operator(**{**named, "num_pages": 1, **forced})
        return out, lse, pages[..., :0].contiguous()

    return faulty


def _takes_lists_of_every_page(operator: Operator) -> Operator:
    """Ignores budgets and kept lists, where it must refuse them."""

    def faulty(**named: Any) -> Any:
        if named["num_pages"] == 0:
            named |= {"budgets": None, "kept_pages": None, "kept_steps": None}
        return operator(**named)

    return faulty


def _ignores(argument: str, default: Any) -> Callable[[Operator], Operator]:
    def fault(operator: Operator) -> Operator:
        return lambda **named: operator(**{**named, argument: default})

    return fault


@pytest.mark.parametrize(
    ("fault", "operator", "mode"),
    [
        (_results_off, "estimate", "valid"),
        (_results_off, "sparse_decode", "valid"),
        (_results_off, "topk_pages", "valid"),
        (_results_off, "decode_step", "valid"),
        (_writes_behind, "append_kv", "valid"),
        (_writes_behind, "update_bounds", "corrupt"),
        (_reads_behind, "estimate", "valid"),
        (_takes_anything, "append_kv", "invalid"),
        (_takes_anything, "update_bounds", "corrupt"),
        (_refuses_without_a_name, "estimate", "corrupt"),
        (_refuses_without_a_name, "estimate", "invalid"),
        (_code_off, "append_codes", "valid"),
        (_scale_off, "append_codes", "valid"),
        (_ignores("new_lens", None), "append_codes", "valid"),
        (_writes_behind, "append_codes", "valid"),
        (_takes_anything, "append_codes", "invalid"),
        (_takes_anything, "append_codes", "corrupt"),
        (_results_off, "rerank_pages", "valid"),
        (_scores_every_page, "rerank_pages", "valid"),
        (_ignores("new_lens", None), "rerank_pages", "valid"),
        (_ignores("token_reduce", "max"), "rerank_pages", "valid"),
        (_ignores("scale", 1.0), "rerank_pages", "valid"),
        (_reads_behind, "rerank_pages", "valid"),
        (_takes_anything, "rerank_pages", "corrupt"),
        (_refuses_without_a_name, "rerank_pages", "invalid"),
        (_leaves_counters_unfit, "decode_step", "valid"),
        (_leaves_counters_unfit, "decode_step", "corrupt"),
        (_counts_refused_calls, "decode_step", "corrupt"),
        (_takes_few_counters, "decode_step", "invalid"),
        (_always_selects, "decode_step", "valid"),
        (_keeps_the_newest_pages, "decode_step", "valid"),
        (_writes_behind_lists, "decode_step", "valid"),
        (_takes_any_kept_lists, "decode_step", "invalid"),
        (_refuses_kept_numbers, "decode_step", "corrupt"),
        (_ignores("dense_below", 0), "topk_pages", "valid"),
        (_ignores("dense_below", 0), "decode_step", "valid"),
        (_ignores("dense_below", 0), "topk_pages", "invalid"),
        (_reads_one_page, "decode_step", "valid"),
        (_takes_lists_of_every_page, "decode_step", "invalid"),
    ],
)
def test_planted_faults_are_found(
    monkeypatch: pytest.MonkeyPatch, fault: Callable[[Operator], Operator], operator: str, mode: str
) -> None:
    monkeypatch.setattr(ops, operator, fault(getattr(ops, operator)))
    found = 0
    for number in range(15):
        try:
            run(draw(f"planted-{number}", operator, mode))
        except Exception:  # noqa: PERF203
            found += 1
    assert found > 0
