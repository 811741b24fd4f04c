"""The arguments of a plan: contiguous tensors on the CPU, and their copies in guarded memory on a device."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from helpers.operator_cases import DTYPES, KINDS, UNREAD_BYTE, Case, Shape, place
from helpers.selection_rule import random_scores
from helpers.steps import before_step
from quest_ops import ops, reference
from torch import Tensor

from .plans import APPENDING, LAYOUTS, Plan

Arguments = dict[str, Any]
#: Tensors that each operator writes to.
WRITTEN = {
    "append_kv": ("k_cache", "v_cache", "k_bounds", "k_scales"),
    "update_bounds": ("k_bounds", "k_scales"),
    "append_codes": ("k_codes", "code_scales"),
    "decode_step": ("k_cache", "v_cache", "k_bounds", "k_scales", "counters", "kept_pages"),
}

#: Tensors whose last dimension may have any stride too.
ANY_STRIDES = ("k_scales", "code_scales")
#: Tensors that must be contiguous.
CONTIGUOUS = ("kept_pages",)


def arguments(plan: Plan) -> Arguments:
    """An operator's arguments by name, valid as they are."""
    made = _MAKERS[plan["operator"]](plan, _case(plan))
    if plan["no_sequences"]:
        by_sequence = ("q", "k", "v", "page_table", "seq_lens", "start_lens", "new_lens", "first_token", "scores")
        for name in (*by_sequence, "pages", "budgets", "kept_pages", "kept_steps"):
            if isinstance(made.get(name), Tensor):
                made[name] = made[name][:0]
    if plan["mode"] == "invalid":  # a change may be accepted, and lead to memory that was not to be read
        for name in ("k_cache", "v_cache", "k_bounds", "k_scales", "code_scales"):
            if isinstance(made.get(name), Tensor):
                made[name] = made[name].nan_to_num()
    return made


def _case(plan: Plan) -> Case:
    shape = Shape(
        dtype=DTYPES[("float32", "float16", "bfloat16").index(plan["dtype"])],
        **{name: plan[name] for name in ("head_dim", "page_size", "kv_heads", "group", "new_tokens")},
        lengths=tuple(plan["lengths"]),
        spare_pages=plan["spare_pages"],
        shared_pages=plan["shared_pages"],
        kind=KINDS[plan["kind"]],
        seed=plan["seed"],
    )
    steps = plan["operator"] in APPENDING
    news = None if plan["new_lens"] is None else tuple(plan["new_lens"])
    case = before_step(shape, news) if steps else Case(shape)
    case.q = (case.q * plan["magnitude"]).to(shape.dtype)
    if not steps and news is not None:
        case.new_lens = torch.tensor(news, dtype=torch.int32)
    return case


def _append_kv(plan: Plan, x: Case) -> Arguments:
    return {
        "k": x.k,
        "v": x.v,
        "k_cache": x.k_cache,
        "v_cache": x.v_cache,
        "k_bounds": x.k_bounds,
        "page_table": x.page_table,
        "seq_lens": x.start_lens,
        "new_lens": x.new_lens,
        "k_scales": x.k_scales,
        "std_factor": x.shape.kind.std_factor,
    }


def _update_bounds(plan: Plan, x: Case) -> Arguments:
    first = plan["first_tokens"]
    x.k_bounds.fill_(UNREAD_BYTE if x.shape.kind.scaled else math.nan)
    if x.k_scales is not None:
        x.k_scales.fill_(math.nan)
    return {
        "k_cache": x.k_cache,
        "k_bounds": x.k_bounds,
        "page_table": x.page_table,
        "seq_lens": x.seq_lens,
        "first_token": None if first is None else torch.tensor(first, dtype=torch.int32),
        "k_scales": x.k_scales,
        "std_factor": x.shape.kind.std_factor,
    }


def _estimate(plan: Plan, x: Case) -> Arguments:
    return {
        "q": x.q,
        "k_bounds": x.k_bounds,
        "page_table": x.page_table,
        "seq_lens": x.seq_lens,
        "page_size": plan["page_size"],
        "k_scales": x.k_scales,
        "new_lens": x.new_lens,
    }


def _topk_pages(plan: Plan, x: Case) -> Arguments:
    T, P = x.shape.new_tokens, x.shape.capacity
    scores = random_scores(plan["scores"], (*x.q.shape[:-1], P), x.random)
    visible = reference.visible_by_token(x.seq_lens, max(1, T), x.new_lens)
    for rows, by_token in zip(scores.view(len(scores), max(1, T), -1, P), visible, strict=True):
        for row, tokens in zip(rows, by_token, strict=True):
            row[:, reference.num_pages(tokens, plan["page_size"]) :] = math.nan
    return {
        "scores": scores,
        "seq_lens": x.seq_lens,
        "page_size": plan["page_size"],
        "k": plan["k"],
        "num_kv_heads": plan["kv_heads"],
        **_selection(plan),
        "scale": plan["scale"],
        "new_lens": x.new_lens,
    }


def _selection(plan: Plan) -> Arguments:
    budgets = plan["budgets"]
    return {
        **{name: plan[name] for name in ("group_reduce", "sink_pages", "recent_pages")},
        "budgets": None if budgets is None else torch.tensor(budgets, dtype=torch.int32),
        **({"dense_below": plan["dense_below"]} if "dense_below" in plan else {}),  # a plan may be older
    }


def pages_to_select(a: Arguments | Plan) -> int:
    """topk_pages' k, or decode_step's num_pages. Its k is a tensor."""
    k: int = a["num_pages"] if "num_pages" in a else a["k"]
    return k


def places(a: Arguments | Plan, page_size: int) -> int:
    """K, of the lists that topk_pages or decode_step selects."""
    return max(pages_to_select(a), reference.num_pages(a.get("dense_below", 0), page_size))


#: Factors of normal keys.
_MAGNITUDES = {"normal": 1.0, "large": 1e15, "small": 1e-15, "overflowing": 1e25, "special": 1.0}


def _append_codes(plan: Plan, x: Case) -> Arguments:
    k = (x.k.double() * _MAGNITUDES[plan["keys"]]).to(x.k.dtype)
    if plan["keys"] == "special":
        keys = k.view(-1, k.shape[-1])
        kinds = torch.randint(8, (len(keys),), generator=x.random)
        keys[kinds == 0] = 0
        keys[kinds == 1, 1:] = 0  # all elements are equally large after the rotation
        keys[kinds == 2] = 1  # one element is not 0 after the rotation
        keys[kinds == 3, 5] = math.inf
        keys[kinds == 4, -1] = math.nan
    N, Hkv, S, D = x.k_cache.shape
    return {
        "k": k,
        "k_codes": torch.full((N, Hkv, S, D // 4), UNREAD_BYTE, dtype=torch.uint8),
        "code_scales": torch.full((N, Hkv, S), math.nan),
        "page_table": x.page_table,
        "seq_lens": x.start_lens,
        "new_lens": x.new_lens,
    }


def _lists(plan: Plan, x: Case) -> tuple[Case, Tensor]:
    """The case with pages that no list has full of NaN, and the lists."""
    pages = x.random_pages(max(1, plan["k"]), "per_head" in plan["lists"], "shuffled" in plan["lists"])
    if plan["k"] == 0:
        pages.fill_(-1)
    return x.poisoned(pages), pages[..., : plan["k"]]


def _rerank_pages(plan: Plan, x: Case) -> Arguments:
    x, pages = _lists(plan, x)
    levels, scales = reference.encode_keys(x.k_cache)
    k_codes, code_scales = reference.pack_codes(levels), scales.float()
    if plan["codes"] == "any":
        k_codes = torch.randint(256, k_codes.shape, dtype=torch.uint8, generator=x.random)
        factors = torch.tensor([1.0, 1.0, 1.0, 1e-9, 0.0, -2.0])
        code_scales *= factors[torch.randint(len(factors), scales.shape, generator=x.random)]
    return {
        "q": x.q,
        "k_codes": k_codes,
        "code_scales": code_scales,
        "page_table": x.page_table,
        "seq_lens": x.seq_lens,
        "pages": pages,
        "token_reduce": plan["token_reduce"],
        "scale": plan["scale"],
        "new_lens": x.new_lens,
    }


def _sparse_decode(plan: Plan, x: Case) -> Arguments:
    pages = None
    if plan["lists"] != "none":
        x, pages = _lists(plan, x)
    return {
        "q": x.q,
        "k_cache": x.k_cache,
        "v_cache": x.v_cache,
        "page_table": x.page_table,
        "seq_lens": x.seq_lens,
        "pages": pages,
        "scale": plan["scale"],
        "new_lens": x.new_lens,
    }


def _decode_step(plan: Plan, x: Case) -> Arguments:
    for b, idle in enumerate(plan["idle"]):
        if idle:
            x.start_lens[b] = x.seq_lens[b] = 0
    append = _append_kv(plan, x)
    append.pop("seq_lens")
    counters = {}
    if "counters" in plan:  # the plans kept before have none
        spare = plan["counters"]
        batch = len(plan["lengths"])
        counters["counters"] = None if spare is None else ops.new_counters(batch + spare, plan["kv_heads"], "cpu")
    return {
        "q": x.q,
        **append,
        "start_lens": x.start_lens,
        "seq_lens": x.seq_lens,
        "num_pages": plan["k"],
        **_selection(plan),
        "scale": plan["scale"],
        **counters,
        **_kept_lists(plan, x),
    }


def _kept_lists(plan: Plan, x: Case) -> Arguments:
    if "kept_lists" not in plan:  # a plan older than them
        return {}
    kept, every = plan["kept_lists"], {"reselect_every": plan["reselect_every"]}
    if kept is None:
        return {"kept_pages": None, "kept_steps": None, **every}
    heads = x.q.shape[-2] if plan["group_reduce"] == "none" else plan["kv_heads"]
    size = (len(plan["lengths"]), heads, places(plan, plan["page_size"]) + kept["room"])
    counts = torch.tensor([reference.num_pages(n, plan["page_size"]) for n in plan["lengths"]])[:, None, None]
    pages = (torch.rand(size, generator=x.random) * (counts + 2)).int() - 1  # and the numbers beside those of pages
    numbers = torch.randint(-(2**31), 2**31, size, generator=x.random).int()
    pages = numbers.where(torch.rand(size, generator=x.random) < kept["any_numbers"], pages)
    return {"kept_pages": pages, "kept_steps": torch.tensor(kept["steps"], dtype=torch.int32), **every}


def other_step(sequences: int) -> Arguments:
    """A step of other sizes, which is one kernel on a GPU."""
    lengths = tuple(range(21, 21 + 4 * sequences, 4))
    x = before_step(Shape(torch.float16, kv_heads=1, lengths=lengths, seed=sequences))
    names = ("q", "k", "v", "k_cache", "v_cache", "k_bounds", "page_table", "start_lens", "seq_lens")
    return {name: getattr(x, name) for name in names} | {"num_pages": 2}


_MAKERS: dict[str, Callable[[Plan, Case], Arguments]] = {
    "append_kv": _append_kv,
    "update_bounds": _update_bounds,
    "estimate": _estimate,
    "topk_pages": _topk_pages,
    "append_codes": _append_codes,
    "rerank_pages": _rerank_pages,
    "sparse_decode": _sparse_decode,
    "decode_step": _decode_step,
}


def placed(given: Arguments, layouts: list[int], device: str, fill: float | None = None) -> Arguments:
    """Copies on the device, each in the middle of memory of its own: its ``_base``.

    Args:
        given: the arguments.
        layouts: indices of :data:`LAYOUTS`, taken by turns.
        device: of the copies.
        fill: of the memory around; None: NaN, or the largest number of an integer dtype.
    """
    copies = dict(given)
    for i, (name, x) in enumerate(given.items()):
        if not isinstance(x, Tensor):
            continue
        layout = LAYOUTS[layouts[i % len(layouts)]]
        if name in ANY_STRIDES and x.dim() > 1:
            copies[name] = place(x.mT, layout, device).mT
        elif name in CONTIGUOUS:
            copies[name] = place(x.flatten(), layout, device).view(x.shape)
        else:
            copies[name] = place(x, layout, device)
        if fill is not None:
            refill(copies[name], fill)
    return copies


def refill(x: Tensor, fill: float) -> None:
    """Put another number in the memory around a placed tensor."""
    values = x.clone()
    x._base.fill_(fill)
    x.copy_(values)


def memory(x: Tensor) -> Tensor:
    """All memory of a placed tensor."""
    return x if x._base is None else x._base
