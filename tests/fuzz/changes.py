"""Changes that make arguments invalid, and the values that the operators must refuse.

:func:`wrong_values` is written from docs/operators.md. It shares no code with csrc/check_values.h.
"""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from helpers.operator_cases import GARBAGE
from quest_ops import ops
from torch import Tensor

from .arguments import ANY_STRIDES, Arguments, places
from .plans import ANY_NEW_TOKENS, APPENDING, Plan

#: Arguments that may be None, where an operator does not require them.
OPTIONAL = ("new_lens", "first_token", "budgets", "pages", "k_scales", "std_factor", "scale", "counters")
#: Tensors that a step takes together, or neither of them.
KEPT = ("kept_pages", "kept_steps")
NUMBERS = {
    "page_size": (0, -16, 12, 256, 2**31, 2**62, 16.5, None, "16"),
    "k": (0, -1, 2**31, 2**62, 2.5, None),
    "num_pages": (0, -1, 2**31, 2**62, 2.5, None),
    "num_kv_heads": (0, -1, 3, 7, 2**31, 2**62, None),
    "sink_pages": (-1, 41, 2**31, 2**62, None),
    "recent_pages": (-1, 0, 41, 2**31, 2**62, None),
    "reselect_every": (0, -1, 2**31, 2**62, 2.5, None),
    "dense_below": (-1, 2**31 - 1, 2**31, 2**62, 2.5, None, 40, 700),
    "group_reduce": ("mean", 4, -1, None),
    "scale": ("1", math.nan),
    "std_factor": (-1.0, math.inf, math.nan, 1e39, "1"),
}
#: Numbers of one operator, which must refuse them all.
NUMBERS_OF = {
    "rerank_pages": {
        "token_reduce": ("mean", 2, -1, 0, 1.0, None),
        "scale": ("1", math.nan, math.inf, 0.0, -0.0, -1.0, 1e39, 1e-60, None),
    }
}
REQUIRED = {"rerank_pages": ("pages",)}
EXTREMES = (-(2**31), -(2**31) + 1, -17, -2, -1, 0, 1, 3, 9, 17, 64, 65, 2**20, 2**31 - 16, GARBAGE)


def changed(plan: Plan, given: Arguments) -> tuple[Arguments, str, bool | None]:
    """The arguments with one of them changed.

    Returns:
        The arguments, the name of the changed one, and whether the operator must refuse them. None: it may also take
        them, and then the reference judges the result.
    """
    r = random.Random(plan["change_seed"])
    names = [name for name, x in given.items() if x is not None or name in (*OPTIONAL, *KEPT)]
    if "counters" in given:
        names += ["counters"] * 6  # more often, for the case of their own below
    if given.get("num_pages") == 0:
        names += ["budgets", *KEPT] * 6  # which a step over every page must refuse
    name = r.choice(names)
    x = given[name]
    if name == "counters" and r.random() < 0.5:
        few = r.choice((0, 1, _counters_needed(given) - 1))
        return {**given, name: torch.zeros(few, dtype=torch.int32, device=given["q"].device)}, name, True
    if name in KEPT:
        lists, refused = _changed_lists(r, name, given)
        return {**given, **lists}, name, refused
    own = NUMBERS_OF.get(plan["operator"], {})
    if name in own:
        return {**given, name: r.choice(own[name])}, name, True
    if name in NUMBERS:
        value: Any = r.choice(NUMBERS[name])
        refused = None if isinstance(value, float) and name == "scale" else True
        if isinstance(value, int) and name in ("num_kv_heads", "sink_pages", "recent_pages"):
            refused = None
        if name == "recent_pages" and value == 0 and given.get("kept_pages") is not None:
            refused = True
        if (name, value) in (("num_pages", 0), ("dense_below", 40), ("dense_below", 700)):
            refused = _contradicts({**given, name: value})
        return {**given, name: value}, name, refused
    if name == "budgets" and given.get("num_pages") == 0 and x is None:
        return {**given, name: torch.zeros_like(given["seq_lens"])}, name, True
    if x is None:  # a tensor where none was
        size = r.choice(((), (2,), (3, 4), (2, 3, 4), tuple(given[_first(given)].shape[:1])))
        dtype = r.choice((torch.int32, torch.int64, torch.float32))
        value = torch.zeros(size, dtype=dtype, device=given[_first(given)].device)
        return {**given, name: value}, name, True if name == "counters" else None  # all are too few counters
    optional = name in OPTIONAL and name not in REQUIRED.get(plan["operator"], ())
    value, refused = _changed_tensor(r, name, x, optional)
    if name == "counters" and refused is None and value is not None:
        refused = value.numel() < _counters_needed(given)
    return {**given, name: value}, name, refused


def _counters_needed(given: Arguments) -> int:
    return ops.new_counters(len(given["q"]), given["k"].shape[2], "meta").numel()


def _contradicts(given: Arguments) -> bool:
    """Whether a step must refuse numbers that are valid by themselves."""
    kept = given.get("kept_pages")
    if given.get("num_pages") == 0:
        return kept is not None or given["budgets"] is not None
    return kept is not None and kept.shape[2] < places(given, given["k_cache"].shape[2])


def _changed_lists(r: random.Random, name: str, given: Arguments) -> tuple[Arguments, bool]:
    """One of the tensors of kept lists, or both where the step has none; and whether that must be refused."""
    x, k = given[name], places(given, given["k_cache"].shape[2])
    if x is None:
        q, kv_heads = given["q"], given["k"].shape[2]
        heads = q.shape[-2] if given["group_reduce"] == "none" else kv_heads
        new = {"kept_pages": (len(q), heads, k), "kept_steps": (len(q),)}
        lists = {key: torch.zeros(size, dtype=torch.int32, device=q.device) for key, size in new.items()}
        if r.random() < 0.5:
            return {name: lists[name]}, True
        return lists, given["k"].shape[1] > 1 or given["recent_pages"] == 0 or given["num_pages"] == 0
    if name == "kept_pages" and r.random() < 0.2:
        value, refused = torch.cat([x, x], -1)[..., : x.shape[-1]], None
    else:
        value, refused = _changed_tensor(r, name, x, optional=False)
    if refused is None and name == "kept_pages":
        refused = value.shape[:2] != x.shape[:2] or value.shape[2] < k or not value.is_contiguous()
    elif refused is None:
        refused = value.shape != x.shape
    return {name: value}, refused


def _first(given: Arguments) -> str:
    return next(name for name, x in given.items() if isinstance(x, Tensor))


def _changed_tensor(r: random.Random, name: str, x: Tensor, optional: bool) -> tuple[Any, bool | None]:
    kinds = ["dtype", "more", "fewer", "size", "stride", "none", "meta", "sparse", "negative", "zero", "complex", "int"]
    kind = r.choice(kinds)
    if kind == "dtype":
        others = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int8)
        dtype = r.choice([dtype for dtype in (*others, torch.uint8, torch.bool) if dtype != x.dtype])
        return x.to(dtype), None if x.is_floating_point() or name == "k_bounds" else True
    if kind == "more":
        return x[None] if r.random() < 0.5 else x[..., None], None if name in ("q", "scores", "pages") else True
    if kind == "fewer":
        return (x.flatten(0, 1) if x.dim() > 1 else x.sum()), None if name in ("q", "scores", "pages") else True
    if kind == "size":
        dim = r.randrange(x.dim())
        if r.random() < 0.5 and x.shape[dim] > 0:
            return x.narrow(dim, 0, x.shape[dim] - 1).clone(), None
        return torch.cat([x, x.new_zeros((*x.shape[:dim], 1, *x.shape[dim + 1 :]))], dim), None
    if kind == "stride":
        must = x.shape[-1] > 1 and name not in ANY_STRIDES
        return torch.stack([x] * 2, -1)[..., 0], True if must else None
    if kind == "none":
        return None, None if optional else True
    if kind == "meta":
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta"), True
    if kind == "sparse":
        return x.to_sparse(), True
    if kind == "negative":
        return torch._neg_view(x), True
    if kind == "zero":
        return torch._efficientzerotensor(x.shape, dtype=x.dtype, device=x.device), True
    if kind == "complex":
        return x.to(torch.complex64).conj(), True
    return 3, True


def corrupted(plan: Plan, given: Arguments) -> Arguments:
    """The arguments with numbers of any 32 bits in some of the :func:`tensors_of_numbers`."""
    r = random.Random(plan["change_seed"])
    names = [name for name in tensors_of_numbers(given) if given[name].numel()]
    if not names:
        return given
    if given.get("kept_pages") is not None and r.random() < 0.5:
        names = list(KEPT)  # alone, for calls that are accepted
    copies = dict(given)
    for name in r.sample(names, r.randint(1, len(names))):
        numbers = given[name].flatten().tolist()
        share = r.choice((0.0, 0.1, 1.0))
        any_number = r.random() < 0.5
        for i in {r.randrange(len(numbers)), *(i for i in range(len(numbers)) if r.random() < share)}:
            numbers[i] = r.randint(-(2**31), 2**31 - 1) if any_number else r.choice(EXTREMES)
        copies[name] = torch.tensor(numbers, dtype=torch.int32).view_as(given[name])
    return copies


def tensors_of_numbers(given: Arguments) -> list[str]:
    """Lengths, page numbers, lists, budgets and steps. Counters are the operator's own: a caller never sets them."""
    tensors = {name: x for name, x in given.items() if isinstance(x, Tensor)}
    return [name for name, x in tensors.items() if x.dtype == torch.int32 and name != "counters"]


def wrong_values(operator: str, a: Arguments) -> bool:
    """Whether lengths, page numbers or lists are out of their range, where the operator reads them.

    Kept lists and their steps have no range: a step takes any numbers.
    """
    lens = a["seq_lens"].tolist()
    if operator == "topk_pages":
        P, S, T = a["scores"].shape[-1], a["page_size"], _new_tokens(a["scores"])
    else:
        pool = next(a[name] for name in ("k_cache", "k_codes", "k_bounds") if name in a)
        S = a["page_size"] if operator == "estimate" else pool.shape[2]
        P, N = a["page_table"].shape[1], len(pool)
        T = a["k"].shape[1] if operator in APPENDING else _new_tokens(a.get("q"))

    def nowhere(b: int, first_token: int, tokens: int) -> bool:
        """Whether a page from that of first_token to that of the last token does not exist."""
        entries = a["page_table"][b, first_token // S : -(-tokens // S)].tolist()
        return any(not 0 <= page < N for page in entries)

    for b, length in enumerate(lens):
        n = T if a.get("new_lens") is None else int(a["new_lens"][b])
        if not 0 <= length <= P * S or not 0 <= n <= T:
            return True
        if operator in ANY_NEW_TOKENS and (length + n > P * S or (n and nowhere(b, length, length + n))):
            return True
        if operator == "update_bounds":
            first = 0 if a["first_token"] is None else int(a["first_token"][b])
            if first < 0 or nowhere(b, first, length):
                return True
        if operator in ("estimate", "rerank_pages", "sparse_decode", "decode_step") and nowhere(b, 0, length):
            return True
        if operator == "decode_step":
            start = int(a["start_lens"][b])
            if not 0 <= start <= P * S or not (length == start + n or start == length == 0):
                return True
    pages = a.get("pages")
    return pages is not None and bool(((pages < -1) | (pages >= P)).any())


def _new_tokens(x: Tensor | None) -> int:
    return x.shape[1] if x is not None and x.dim() == 4 else 1
