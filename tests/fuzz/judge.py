"""Runs a plan and judges it: by the float64 reference, by the memory around each tensor, and by the refusal.

Each call is made twice, with different numbers in the memory around the tensors. Results that differ have read it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from helpers import torch_baseline
from helpers.operator_cases import assert_accurate, assert_exact, assert_same_bits
from helpers.selection_rule import EXACT_SUMS, assert_list_is_as_good
from quest_ops import ops, reference
from quest_ops._limits import HEAD_COUNTERS, SHARED_COUNTERS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from .arguments import WRITTEN, Arguments, arguments, memory, other_step, pages_to_select, placed, places
from .changes import changed, corrupted, tensors_of_numbers, wrong_values
from .plans import Plan

REFUSALS = (RuntimeError, ValueError, TypeError)


def run(plan: Plan, device: str = "cpu") -> str:
    """Judge one case.

    Returns:
        "accepted" or "refused".

    Raises:
        AssertionError: the operator is wrong. An exception of another type is a fault too.
    """
    given = arguments(plan)
    if plan["mode"] == "valid":
        judge_accepted(plan, given, device)
        return "accepted"
    if plan["mode"] == "corrupt":
        return judge_corrupt(plan, given, device)
    return judge_invalid(plan, given, device)


def call(operator: str, x: Arguments) -> tuple[Tensor, ...]:
    results = getattr(ops, operator)(**x)
    if device_of(x) == "cuda":
        torch.cuda.synchronize()  # a fault of the kernel shows here
    return () if results is None else results if isinstance(results, tuple) else (results,)


def device_of(x: Arguments) -> str:
    return next((y.device.type for y in x.values() if isinstance(y, Tensor) and y.device.type != "meta"), "cpu")


# Accepted calls


def judge_accepted(plan: Plan, given: Arguments, device: str) -> None:
    operator, layouts = plan["operator"], plan["layouts"]
    x = placed(given, layouts, device)
    _use_counters(plan, given, x, device)
    before = {name: memory(y).clone() for name, y in x.items() if isinstance(y, Tensor)}
    results = call(operator, x)
    _check_metadata(operator, given, x, results)
    expected = _written(operator, given)
    if operator == "decode_step":
        given = {**given, **_scores_and_lists(given, x)}
        if "kept_after" in given:
            expected["kept_pages"] = given["kept_after"]
    for name, old in before.items():
        if name in WRITTEN.get(operator, ()):
            y = x[name]
            inside = expected.get(name, y)  # the steps below judge counters
            old.as_strided(y.shape, y.stride(), y.storage_offset()).copy_(inside)
        assert_same_bits(memory(x[name]), old)
    results = tuple(y.cpu() for y in results)
    _JUDGES.get(operator, _no_result)({**given, **expected}, results, plan)

    # Counters are unused, then those that the call has left, then none.
    counters = x.get("counters")
    for change in ({}, {"counters": counters}, {"counters": None}) if counters is not None else ({},):
        other = placed({name: given[name] for name in x}, layouts, device, fill=0) | change
        for actual, first in zip(call(operator, other), results, strict=True):
            assert_same_bits(actual.cpu(), first)
        for name in expected:
            assert_same_bits(other[name], x[name])


def _use_counters(plan: Plan, given: Arguments, x: Arguments, device: str) -> None:
    """Run the plan's earlier steps with the counters of x.

    Args:
        plan: of the case.
        given: accepted arguments, of the step that is the same.
        x: the arguments of the call that follows.
        device: of the steps.
    """
    counters = x.get("counters")
    if counters is None:
        return
    most = (counters.numel() - SHARED_COUNTERS) // HEAD_COUNTERS
    for sequences in plan["earlier_steps"]:
        fitting = min(sequences, most)
        step = other_step(fitting) if fitting else given
        call("decode_step", placed(step, plan["layouts"], device) | {"counters": counters})


def _assert_counters_serve(plan: Plan, given: Arguments, counters: Tensor, device: str) -> None:
    """A step with the counters has the bits of one without."""
    with_counters, without = (placed(given, plan["layouts"], device) | {"counters": y} for y in (counters, None))
    for actual, expected in zip(call("decode_step", with_counters), call("decode_step", without), strict=True):
        assert_same_bits(actual, expected)
    for name in WRITTEN["decode_step"]:
        if name != "counters" and without.get(name) is not None:
            assert_same_bits(memory(with_counters[name]), memory(without[name]))


def _written(operator: str, a: Arguments) -> dict[str, Tensor]:
    """The reference's values of the tensors that the operator writes to."""
    if operator == "update_bounds":
        where = (a["page_table"], a["seq_lens"], a["first_token"], a["std_factor"])
        if a["k_scales"] is None:
            return {"k_bounds": reference.update_bounds(a["k_cache"], a["k_bounds"], *where)}
        bounds = reference.update_scaled_bounds(a["k_cache"], a["k_bounds"], a["k_scales"], *where)
        return dict(zip(("k_bounds", "k_scales"), bounds, strict=True))
    if operator == "append_codes":
        return _codes_within_rounding(a, _encoded_one_by_one(a))
    if operator not in WRITTEN:
        return {}
    lens, news = a["seq_lens"], a["new_lens"]
    if operator == "decode_step":
        lens, news = a["start_lens"], a["seq_lens"] - a["start_lens"]
    cache = (a["k"], a["v"], a["k_cache"], a["v_cache"], a["k_bounds"], a["page_table"])
    written = reference.append_kv(*cache, lens, news, a["k_scales"], a["std_factor"])
    return dict(zip(WRITTEN[operator], written, strict=False))


def _encoded_one_by_one(a: Arguments) -> dict[str, Tensor]:
    """By the CPU, a call for each new token. A code depends on its key alone, and both devices give the same bits."""
    codes = {name: a[name].clone() for name in WRITTEN["append_codes"]}
    for t in range(a["k"].shape[1]):
        new = torch.ones_like(a["seq_lens"]) if a["new_lens"] is None else (a["new_lens"] > t).int()
        lens = torch.where(new > 0, a["seq_lens"] + t, 0)
        call("append_codes", {**a, **codes, "k": a["k"][:, t : t + 1], "seq_lens": lens, "new_lens": new})
    return codes


def _codes_within_rounding(a: Arguments, actual: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reference's codes and scales, but the actual ones that float32 may round differently.

    Near a border of two levels either is right. A rotation in float32 is off by at most log2(D) roundings of the sum of
    |k|. At head_dim 256 that is 8e-6 of the distance of two levels.
    """
    k, lens = a["k"], a["seq_lens"]
    too_large = k.float().square().sum(-1, keepdim=True).isinf()
    where = (a["page_table"], lens, a["new_lens"])
    k_codes, code_scales = reference.append_codes(k.masked_fill(too_large, math.inf), *(a[n] for n in actual), *where)
    keys = torch.full((*code_scales.shape, k.shape[-1]), math.nan, dtype=torch.float64)
    for b, length in enumerate(lens.tolist()):
        for t in range(k.shape[1] if a["new_lens"] is None else int(a["new_lens"][b])):
            page, slot = divmod(length + t, k_codes.shape[2])
            keys[a["page_table"][b, page], :, slot] = k[b, t].double()
    step = 2 * code_scales.double()[..., None]
    rotated, rounding = reference.hadamard(keys), 1e-5 * step
    levels, ours = reference.unpack_codes(k_codes), reference.unpack_codes(actual["k_codes"])
    near = torch.stack([(rotated - border * step).abs() for border in (-1, 0, 1)]).amin(0) <= rounding
    levels = ours.where(near & ((ours - levels).abs() == 2), levels)
    near = (actual["code_scales"] - code_scales).abs() <= rounding[..., 0]
    return {"k_codes": reference.pack_codes(levels), "code_scales": actual["code_scales"].where(near, code_scales)}


def _check_metadata(operator: str, given: Arguments, x: Arguments, results: tuple[Tensor, ...]) -> None:
    """Results are contiguous, and those of fake tensors have their sizes and dtypes."""
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(y) if isinstance(y, Tensor) else y for name, y in x.items()}
        expected = getattr(ops, operator)(**fake)
    expected = () if expected is None else expected if isinstance(expected, tuple) else (expected,)
    for actual, y in zip(results, expected, strict=True):
        assert actual.is_contiguous()
        assert (actual.shape, actual.dtype, actual.device) == (y.shape, y.dtype, y.device)


def _no_result(a: Arguments, results: tuple[Tensor, ...], plan: Plan) -> None:
    assert results == ()


def _judge_estimate(a: Arguments, results: tuple[Tensor, ...], plan: Plan) -> None:
    where = (a["k_bounds"], a["page_table"], a["seq_lens"], a["page_size"], a["k_scales"])
    exact = reference.estimate(a["q"], *where, a["new_lens"])
    q, news = a["q"], a["new_lens"]
    (like,) = torch_baseline.in_several_orders(torch_baseline.estimate, _at_the_end(q, news), *where)
    assert_accurate(results[0], exact, torch.stack([_at_the_start(y, q, news) for y in like]), q.dtype)


def _judge_rerank_pages(a: Arguments, results: tuple[Tensor, ...], plan: Plan) -> None:
    q, news = a["q"], a["new_lens"]
    where, reduce = (a["code_scales"], a["page_table"], a["seq_lens"]), (a["token_reduce"], a["scale"])
    exact = reference.rerank_pages(q, a["k_codes"], *where, a["pages"], *reduce, news)
    rotated = _at_the_end(reference.hadamard(q.float()).to(q.dtype), news)
    levels, shifted = reference.unpack_codes(a["k_codes"]), _at_the_end(a["pages"], news)
    (like,) = torch_baseline.in_several_orders(torch_baseline.rerank_pages, rotated, levels, *where, shifted, *reduce)
    assert_accurate(results[0], exact, torch.stack([_at_the_start(y, q, news) for y in like]), q.dtype)


def _judge_sparse_decode(a: Arguments, results: tuple[Tensor, ...], plan: Plan) -> None:
    q, pages, news = a["q"], a["pages"], a["new_lens"]
    where = (a["k_cache"], a["v_cache"], a["page_table"], a["seq_lens"])
    exact = reference.sparse_decode(q, *where, pages, a["scale"], news)
    if a["scale"] is not None and math.isnan(a["scale"]):  # the baseline has no empty rows then
        for actual, y in zip(results, exact, strict=True):
            assert_exact(actual.double(), y)
        return
    shifted = None if pages is None else _at_the_end(pages, news)
    likes = torch_baseline.in_several_orders(
        torch_baseline.sparse_decode, _at_the_end(q, news), *where, shifted, a["scale"]
    )
    for actual, y, like in zip(results, exact, likes, strict=True):
        assert_accurate(actual, y, torch.stack([_at_the_start(z, q, news) for z in like]), q.dtype)
    assert_exact(results[1] == -math.inf, exact[1] == -math.inf)


def _rolled(x: Tensor, new_lens: Tensor | None, T: int, sign: int) -> Tensor:
    if new_lens is None or T == 1:
        return x
    return torch.stack([row.roll(sign * (T - n), 0) for row, n in zip(x, new_lens.tolist(), strict=True)])


def _at_the_end(x: Tensor, new_lens: Tensor | None) -> Tensor:
    """Real tokens last, as they are where there is no padding: the baseline knows none."""
    return _rolled(x, new_lens, x.shape[1] if x.dim() == 4 else 1, 1) if len(x) else x


def _at_the_start(x: Tensor, q: Tensor, new_lens: Tensor | None) -> Tensor:
    return _rolled(x, new_lens, q.shape[1] if q.dim() == 4 else 1, -1) if len(x) else x


class _Selection(NamedTuple):
    """Arguments of one list, as the rule takes them."""

    reduce: str
    kv_heads: int
    group: int
    k: int
    sink: int
    recent: int
    scale: float


def _judge_topk_pages(a: Arguments, results: tuple[Tensor, ...], plan: Plan) -> None:
    exact = a["group_reduce"] in ("none", "max") or (a["group_reduce"] == "sum" and plan["scores"] in EXACT_SUMS)
    _judge_selection(a, results[0], exact)


def _judge_selection(a: Arguments, pages: Tensor, exact: bool) -> None:
    names = ("scores", "seq_lens", "page_size", "k", "num_kv_heads", "group_reduce", "sink_pages", "recent_pages")
    limits = (a["new_lens"], a["budgets"], a.get("dense_below", 0))
    expected = reference.topk_pages(*(a[name] for name in names), a["scale"], *limits)
    if exact:
        assert_exact(pages, expected)
        return
    assert pages.shape == expected.shape
    scores = a["scores"] if a["scores"].dim() == 4 else a["scores"][:, None]
    B, T, Hq, _ = scores.shape
    visible = reference.visible_by_token(a["seq_lens"], T, a["new_lens"])
    sink, recent, heads = a["sink_pages"], a["recent_pages"], a["num_kv_heads"]
    for b, rows in enumerate(pages.view(B, T, *pages.shape[-2:]).tolist()):
        k = _most_pages(a, b, a["page_size"])
        rule = _Selection(a["group_reduce"], heads, Hq // heads, k, sink, recent, a["scale"])
        for t, lists in enumerate(rows):
            n = reference.num_pages(visible[b][t], a["page_size"])
            for h, padded in enumerate(lists):
                assert_list_is_as_good(padded, h, scores[b, t, :, :n].double(), rule)


def _most_pages(a: Arguments, b: int, page_size: int) -> int:
    """The most that sequence b selects, of topk_pages or decode_step."""
    if int(a["seq_lens"][b]) <= a.get("dense_below", 0):
        return places(a, page_size)
    k = pages_to_select(a)
    return k if a["budgets"] is None else min(k, max(a["sink_pages"] + a["recent_pages"], int(a["budgets"][b])))


def _judge_decode_step(a: Arguments, results: tuple[Tensor, ...], plan: Plan) -> None:
    """By the caches after the step. The scores are the operator's own, whose bits the step promises to use."""
    out, lse, pages = results
    if a["num_pages"] == 0:
        assert pages.shape[-1] == 0
        _judge_sparse_decode({**a, "pages": None}, (out, lse), plan)
        for actual, expected in zip((out, lse), a["attention"], strict=True):
            assert_same_bits(actual, expected)
        return
    pages = a.get("selected", pages)
    where = {"page_size": a["k_cache"].shape[2], "k": a["num_pages"], "num_kv_heads": a["k_cache"].shape[1]}
    _judge_selection({**a, **where, "scale": _scale(a)}, pages, a["group_reduce"] in ("none", "max"))
    if "attention" not in a:
        _judge_sparse_decode({**a, "pages": pages}, (out, lse), plan)
        return
    for actual, expected in zip((out, lse), a["attention"], strict=True):
        assert_same_bits(actual, expected)


def _scale(a: Arguments) -> float:
    """Of a step's scores, rounded to float32 as in the operators."""
    return (1 / torch.tensor(float(a["q"].shape[-1])).sqrt()).item() if a["scale"] is None else a["scale"]


def _scores_and_lists(given: Arguments, x: Arguments) -> Arguments:
    """What a step computes on its way, by the other operators, whose bits it promises to use.

    Args:
        given: its arguments.
        x: their copies on the device, after the step.

    Returns:
        attention: out and lse of sparse_decode, for a step over every page, and for one with kept lists.
        scores: of estimate, for a step that selects.
        selected: the lists of topk_pages, for a step with kept lists.
        kept_after: kept_pages after such a step.
    """
    page_size, kv_heads = x["k_cache"].shape[2], x["k_cache"].shape[1]
    where, news = (x["page_table"], x["seq_lens"]), x["new_lens"]
    if x["num_pages"] == 0:
        attention = ops.sparse_decode(x["q"], x["k_cache"], x["v_cache"], *where, None, x["scale"], news)
        return {"attention": tuple(y.cpu() for y in attention)}
    scores = ops.estimate(x["q"], x["k_bounds"], *where, page_size, x["k_scales"], news)
    if x.get("kept_pages") is None:
        return {"scores": scores.cpu()}
    names = ("num_pages", "group_reduce", "sink_pages", "recent_pages")
    k, *rule = (x[name] for name in names)
    limits = (news, x["budgets"], x.get("dense_below", 0))
    selected = ops.topk_pages(scores, x["seq_lens"], page_size, k, kv_heads, *rule, _scale(x), *limits)
    after, read = _kept_lists(given, selected.cpu())
    attention = ops.sparse_decode(
        x["q"], x["k_cache"], x["v_cache"], *where, read.to(selected.device), x["scale"], news
    )
    return {
        "scores": scores.cpu(),
        "selected": selected.cpu(),
        "kept_after": after,
        "attention": tuple(y.cpu() for y in attention),
    }


def _kept_lists(a: Arguments, selected: Tensor) -> tuple[Tensor, Tensor]:
    """The rule of kept lists, as decode_step documents it: kept_pages after the step, and the lists that it reads."""
    k, recent, page_size = selected.shape[-1], a["recent_pages"], a["k_cache"].shape[2]
    after, read = a["kept_pages"].clone(), selected.clone()
    lists = read.view(*after.shape[:2], k)
    for b, (visible,) in enumerate(reference.visible_by_token(a["seq_lens"], 1, a["new_lens"])):
        n, most = reference.num_pages(visible, page_size), _most_pages(a, b, page_size)
        if n <= most or int(a["kept_steps"][b]) % a["reselect_every"] == 0:
            after[b, :, :k] = lists[b]
            continue
        old = slice(most - recent)
        lists[b, :, most - recent : most] = torch.arange(n - recent, n)
        after[b, :, most - recent : k] = lists[b, :, most - recent :]
        kept = after[b, :, old]
        lists[b, :, old] = kept.where((kept >= 0) & (kept < n - recent), -1)
    return after, read


_JUDGES: dict[str, Any] = {
    "estimate": _judge_estimate,
    "topk_pages": _judge_topk_pages,
    "rerank_pages": _judge_rerank_pages,
    "sparse_decode": _judge_sparse_decode,
    "decode_step": _judge_decode_step,
}


# Refused calls


def refusal(operator: str, x: Arguments) -> str | None:
    """The sentence of the refusal, without its place in the source; None where the call is accepted."""
    try:
        call(operator, x)
    except REFUSALS as error:
        return re.sub(r"^\w+, csrc/\S+:\d+, ", "", str(error))
    return None


def judge_invalid(plan: Plan, given: Arguments, device: str) -> str:
    operator = plan["operator"]
    x, name, refused = changed(plan, placed(given, plan["layouts"], device))
    given = changed(plan, given)[0]
    before = {key: memory(y).clone() for key, y in x.items() if _has_memory(y)}
    sentence = refusal(operator, x)
    if sentence is None:
        assert not refused, f"accepted with another {name}"
        if device == "cpu" or not wrong_values(operator, given):  # a GPU does not check numbers unless asked
            judge_accepted(plan, given, device)
        return "accepted"
    assert any(re.search(rf"\b{re.escape(key)}\b", sentence) for key in given), f"names no argument: {sentence}"
    for key, old in before.items():
        assert_same_bits(memory(x[key]), old)
    if all(y is None or not isinstance(y, Tensor) or _has_memory(y) for y in x.values()) and not _by_values(sentence):
        with FakeTensorMode() as mode:
            fake = {key: mode.from_tensor(y) if isinstance(y, Tensor) else y for key, y in x.items()}
            try:
                getattr(ops, operator)(**fake)
            except REFUSALS as error:
                fake_sentence = re.sub(r"^\w+, csrc/\S+:\d+, ", "", str(error))
            else:
                fake_sentence = "accepted"
        assert fake_sentence == sentence, f"fake tensors: {fake_sentence!r}, not {sentence!r}"
    return "refused"


def _by_values(sentence: str) -> bool:
    return "for sequence" in sentence


def _has_memory(x: Any) -> bool:
    plain = isinstance(x, Tensor) and x.layout == torch.strided and x.device.type != "meta"
    return plain and not x.is_neg() and not x.is_conj() and not x._is_zerotensor()


def judge_corrupt(plan: Plan, given: Arguments, device: str) -> str:
    """The CPU refuses wrong values; CUDA does where QUEST_OPS_CHECK=1 asks for it, and stays in its tensors without.

    Both leave counters as the next step needs them.
    """
    operator, layouts = plan["operator"], plan["layouts"]
    valid, given = given, corrupted(plan, given)
    wrong = wrong_values(operator, given)
    x = placed(given, layouts, device)
    _use_counters(plan, valid, x, device)
    before = {key: memory(y).clone() for key, y in x.items() if isinstance(y, Tensor)}
    with value_checks(True):
        sentence = refusal(operator, x)
    assert (sentence is not None) == wrong, sentence or "accepted"
    if sentence is not None:
        assert any(sentence.startswith(f"{key} must") for key in tensors_of_numbers(given)), sentence
        for key, old in before.items():
            assert_same_bits(memory(x[key]), old)
    else:
        _assert_guards(operator, x, before)
    if sentence is None or device != "cpu":
        first, second = (placed(given, layouts, device, fill) for fill in (None, 0))
        _use_counters(plan, valid, first, device)
        with value_checks(False):
            guards = [
                {key: memory(y).clone() for key, y in z.items() if isinstance(y, Tensor)} for z in (first, second)
            ]
            results = [call(operator, z) for z in (first, second)]
        for z, old in zip((first, second), guards, strict=True):
            _assert_guards(operator, z, old)
        # Two sequences that write to one page race on a GPU, so their results may differ.
        if device == "cpu" or operator not in WRITTEN:
            for actual, expected in zip(*results, strict=True):
                assert_same_bits(actual, expected)
            for name in WRITTEN.get(operator, ()):
                if first.get(name) is not None and name != "counters":
                    assert_same_bits(first[name], second[name])
        if first.get("counters") is not None:
            _assert_counters_serve(plan, valid, first["counters"], device)
    if x.get("counters") is not None:
        _assert_counters_serve(plan, valid, x["counters"], device)
    return "accepted" if sentence is None else "refused"


def _assert_guards(operator: str, x: Arguments, before: dict[str, Tensor]) -> None:
    """Nothing but the written tensors has changed."""
    for key, old in before.items():
        now, old = memory(x[key]).clone(), old.clone()
        if key in WRITTEN.get(operator, ()):
            for base in (now, old):
                base.as_strided(x[key].shape, x[key].stride(), x[key].storage_offset()).zero_()
        assert_same_bits(now, old)


@contextmanager
def value_checks(on: bool) -> Iterator[None]:
    before = os.environ.get("QUEST_OPS_CHECK")
    os.environ["QUEST_OPS_CHECK"] = "1" if on else "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["QUEST_OPS_CHECK"]
        else:
            os.environ["QUEST_OPS_CHECK"] = before
