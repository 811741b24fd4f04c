"""Plans of the fuzzer: a case as plain numbers, drawn from a seed and kept as JSON.

A plan says everything, so a kept one gives the same case after the drawing has changed.
"""

from __future__ import annotations

import random
from typing import Any

from quest_ops.ops import GROUP_REDUCE, HEAD_DIMS, PAGE_SIZES, TOKEN_REDUCE

Plan = dict[str, Any]

#: Operators that write new tokens, and those that take any number of them.
APPENDING = ("append_kv", "append_codes", "decode_step")
ANY_NEW_TOKENS = ("append_kv", "append_codes")
#: Operators that select pages, but for short sequences.
SELECTING = ("topk_pages", "decode_step")
#: valid: supported arguments. invalid: one argument of any kind is changed. corrupt: numbers in device tensors are.
MODES = ("valid", "invalid", "corrupt")
DTYPES = ("float32", "float16", "bfloat16")
KINDS = ("minmax", "minmax-8-bit", "minmax-4-bit", "mean-std", "mean-std-8-bit", "mean-std-4-bit")
LAYOUTS = ("contiguous", "transposed", "sliced", "unaligned")
SCORES = ("normal", "equal", "integers", "lowest bits", "subnormal", "special")
#: Keys that append_codes encodes. The squares of overflowing ones do not fit in float32.
KEYS = ("normal", "large", "small", "overflowing", "special")
#: Bytes and scales that rerank_pages reads: those of keys, or any.
CODES = ("encoded", "encoded", "any")
LISTS = ("sorted", "shuffled", "per_head", "per_head_shuffled")
#: Sequences beyond the batch that counters of decode_step have room for. None: the step is given no counters.
SPARE_SEQUENCES = (None, 0, 0, 1, 7, 40)
#: Sequences of another step that has used the counters before. 0: the same step.
EARLIER_STEPS = (0, 0, 1, 3, 20)
#: Keys of a pool, in elements. The reference loops, so a case of the largest takes about a second.
MOST_ELEMENTS = (2**11, 2**13, 2**13, 2**14, 2**15, 2**17)


def draw(seed: str, operator: str, mode: str) -> Plan:
    """A case over the whole domain of an operator, in sizes that the reference can judge."""
    r = random.Random(f"{seed}/{operator}/{mode}")
    head_dim, page_size = r.choice(HEAD_DIMS), r.choice(PAGE_SIZES)
    group = r.choice((1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 20, 32))
    kv_heads = r.randint(1, max(1, min(4, 32 // group)))
    batch = r.choice((1, 1, 2, 2, 3, 4, 6, 9)) if kv_heads * group <= 8 else r.randint(1, 3)
    most_tokens = max(8, r.choice(MOST_ELEMENTS) // (batch * kv_heads * head_dim))
    new_tokens = r.choice((0, 0, 1, 2, 3, 4, 5, 6, 7, 8)) if batch * kv_heads * group < 50 else r.randint(0, 2)
    if operator in ANY_NEW_TOKENS:
        new_tokens = r.choice((1, 1, 2, 8, 9, 40))
    lengths = [_length(r, page_size, most_tokens) for _ in range(batch)]
    news = None if r.random() < 0.5 else [r.randint(0, max(1, new_tokens)) for _ in lengths]
    if operator in APPENDING:
        lengths = [max(n, max(1, new_tokens) if news is None else news[b]) for b, n in enumerate(lengths)]
    elif news is not None:
        news = [min(n, length) for n, length in zip(news, lengths, strict=True)]
    plan: Plan = {
        "operator": operator,
        "mode": mode,
        "dtype": r.choice(DTYPES),
        "head_dim": head_dim,
        "page_size": page_size,
        "kv_heads": kv_heads,
        "group": group,
        "new_tokens": new_tokens,
        "lengths": lengths,
        "new_lens": news,
        "spare_pages": r.randint(1, 3),
        "shared_pages": r.randint(0, 2) if operator in ("estimate", "rerank_pages", "sparse_decode") else 0,
        "kind": r.choice(KINDS),
        "magnitude": r.choice((1.0, 1.0, 0.01, 4.0)),
        "layouts": [r.randrange(len(LAYOUTS)) for _ in range(6)],
        "no_sequences": r.random() < 0.03,
        "seed": r.randrange(2**31),
        **_options(operator, r, batch),
    }
    if operator == "decode_step":
        plan |= _kept_lists(r, plan)
    if operator in SELECTING:
        plan |= _dense(r, plan)
    if mode != "valid":
        plan["change_seed"] = r.randrange(2**31)
    return plan


def _length(r: random.Random, page_size: int, most_tokens: int) -> int:
    if r.random() < 0.1:
        return r.randint(0, 2)
    pages = r.randint(0, max(1, most_tokens // page_size))
    return max(0, pages * page_size + r.choice((0, 0, -1, 1, r.randrange(page_size))))


def _selection(r: random.Random, batch: int) -> Plan:
    k = r.choice((1, 2, 3, 5, 8, 13, 40))
    sinks = r.randint(0, min(3, k))
    return {
        "k": k,
        "sink_pages": sinks,
        "recent_pages": r.randint(0, min(3, k - sinks)),
        "group_reduce": r.choice(tuple(GROUP_REDUCE)),
        "budgets": None if r.random() < 0.5 else [r.choice((-1, 0, 1, 2, 3, k // 2, k, k + 1)) for _ in range(batch)],
    }


def _kept_lists(r: random.Random, plan: Plan) -> Plan:
    """Of a step. Its lists are short and its sequences long: a list of all pages is never kept."""
    every = r.randint(1, 4)
    if plan["new_tokens"] > 1 or plan["recent_pages"] == 0 or r.random() < 0.5:
        return {"reselect_every": every, "kept_lists": None}
    lengths = [n + plan["page_size"] * r.randint(0, 6) for n in plan["lengths"]]
    forced, longest = plan["sink_pages"] + plan["recent_pages"], max(lengths) // plan["page_size"]
    steps = [r.randint(0, 2 * every) for _ in lengths]
    lists = {
        "steps": [r.randint(-(2**31), 2**31 - 1) if r.random() < 0.1 else step for step in steps],
        "room": r.choice((0, 0, 1, 5)),  # places behind those of a list
        "any_numbers": r.choice((0.0, 0.2, 1.0)),  # the share of places that hold any 32 bits
    }
    k = max(forced, min(plan["k"], r.randint(1, max(1, longest))))
    return {"lengths": lengths, "k": k, "reselect_every": every, "kept_lists": lists}


def _dense(r: random.Random, plan: Plan) -> Plan:
    """Half of the cases have a dense_below, around a length. Some steps without kept lists read every page: k is 0."""
    around = r.choice(plan["lengths"]) + r.choice((-1, 0, 1, -plan["page_size"], plan["page_size"]))
    dense: Plan = {"dense_below": 0 if r.random() < 0.5 else max(0, around)}
    if plan["operator"] == "decode_step" and plan["kept_lists"] is None and r.random() < 0.3:
        dense |= {"k": 0, "budgets": None}
    return dense


def _options(operator: str, r: random.Random, batch: int) -> Plan:
    """The numbers that one operator has and others have not."""
    if operator == "update_bounds":
        return {"first_tokens": None if r.random() < 0.5 else [r.randrange(300) for _ in range(batch)]}
    if operator == "topk_pages":
        return {**_selection(r, batch), "scores": r.choice(SCORES), "scale": r.choice((1.0, 0.125, 0.01))}
    if operator == "append_codes":
        return {"keys": r.choice(KEYS)}
    if operator == "rerank_pages":
        return {
            "lists": r.choice(LISTS),
            "k": r.choice((0, 1, 3, 5, 12, 40)),
            "codes": r.choice(CODES),
            "token_reduce": r.choice(tuple(TOKEN_REDUCE)),
            "scale": r.choice((1.0, 0.125, 0.01, 10.0)),
        }
    if operator == "sparse_decode":
        return {
            "lists": r.choice(("none", *LISTS)),
            "k": r.choice((0, 1, 3, 5, 12, 40)),
            "scale": r.choice((None, None, 0.3, 0.01, 0.0)),
        }
    if operator == "decode_step":
        idle = [r.random() < 0.1 for _ in range(batch)]
        step = {**_selection(r, batch), "idle": idle, "scale": r.choice((None, None, 0.3))}
        earlier = [r.choice(EARLIER_STEPS) for _ in range(r.choice((0, 1, 1, 2, 3)))]
        return {**step, "counters": r.choice(SPARE_SEQUENCES), "earlier_steps": earlier}
    return {}
