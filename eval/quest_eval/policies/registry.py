"""Policies by name: the built-in ones, those of installed packages, and any class as ``module:Class``."""

from __future__ import annotations

import importlib
import inspect
import sys
from dataclasses import dataclass, field, fields
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from .. import library
from . import summaries
from .base import Policy
from .configured import Configured
from .dense import Dense
from .h2o import H2O
from .oracle import PageOracle, TokenOracle
from .page_summary import PageSummaryPolicy
from .quest import Quest
from .snapkv import SnapKV
from .sparq import SparQ
from .streaming import Streaming
from .tova import TOVA
from .window import Window

#: A package adds policies by entry points of this group, each a name and a subclass of Policy.
ENTRY_POINTS = "quest_eval.policies"


# Types of fields that the policies' modules import for type checkers alone.
_TYPES = {"GroupReduce": library.GroupReduce, "BoundsKind": library.BoundsKind, "Summary": summaries.Summary}


@dataclass(frozen=True)
class _BuiltIn:
    kind: type[Policy]
    description: str
    options: dict[str, Any] = field(default_factory=dict)


_BUILT_IN = {
    "dense": _BuiltIn(Dense, "the whole cache"),
    "quest": _BuiltIn(Quest, "Quest, a list for each KV head: the maximum of its query heads' scores"),
    "quest-head": _BuiltIn(Quest, "Quest, a list for each query head, as in the paper", {"group_reduce": "none"}),
    "quest-sum": _BuiltIn(
        Quest, "Quest, a list for each KV head: the sum of its query heads' scores", {"group_reduce": "sum"}
    ),
    "quest-soft": _BuiltIn(
        Quest,
        "Quest, a list for each KV head: the sum of its query heads' scores softmaxed over the pages",
        {"group_reduce": "soft"},
    ),
    "quest-shared": _BuiltIn(Quest, "Quest, one list for all heads, as in SGLang", {"shared": True}),
    "quest-meanstd": _BuiltIn(
        Quest,
        "quest, by mean and standard deviation of a page's keys in place of minimum and maximum",
        {"std_factor": 1.0},
    ),
    "quest-int8": _BuiltIn(Quest, "quest, with bounds of 8 bits", {"bounds": "int8"}),
    "quest-default": _BuiltIn(
        Quest,
        "Quest as QuestConfig has it: mean and standard deviation in 4 bits, the first page forced",
        {"bounds": "int4", "std_factor": 1.0, "sink_pages": 1},
    ),
    "quest-config": _BuiltIn(Configured, "Quest as a saved QuestConfig has it"),
    "quest-nodense": _BuiltIn(Quest, "quest, in the first layers as well", {"dense_layers": 0}),
    "summary": _BuiltIn(
        PageSummaryPolicy, "pages by mean and standard deviation of 8 bits, the first page forced; emulated"
    ),
    "two-stage": _BuiltIn(
        PageSummaryPolicy,
        "summary keeps a quarter of the pages, keys of 2 bits choose among them; emulated",
        {"keep": 0.25, "code_bits": 2},
    ),
    "h2o": _BuiltIn(H2O, "H2O: the tokens that received most attention, and the latest; others are evicted"),
    "tova": _BuiltIn(TOVA, "TOVA: the token that the newest attends to least is evicted"),
    "streaming": _BuiltIn(Streaming, "StreamingLLM: 4 first tokens and the latest, positions numbered anew"),
    "window": _BuiltIn(Window, "the first page and the latest pages, positions kept"),
    "sparq": _BuiltIn(SparQ, "SparQ: tokens chosen by the largest components of the query, the rest by the mean value"),
    "snapkv": _BuiltIn(SnapKV, "SnapKV: tokens of the context are evicted once, by the attention of its end"),
    "page-oracle": _BuiltIn(PageOracle, "the pages with the best exact scores, for each query head"),
    "token-oracle": _BuiltIn(TokenOracle, "the tokens with the best exact scores, for each query head"),
}
#: Built-in names with their descriptions. "quest-config" is no name by itself, since it needs a file.
NAMES: dict[str, str] = {name: x.description for name, x in _BUILT_IN.items() if x.kind is not Configured}


def make(name: str, budget: int | None, *, page_size: int = 16, dense_layers: int = 2) -> Policy:
    """The policy of that name.

    Args:
        name: one of :data:`NAMES`, an entry point of the group "quest_eval.policies", or ``module:Class``. The module
            may lie in the current folder. Fields of the policy may follow, as in ``quest,sink_pages=1,bounds=int8``.
        budget: tokens a head may attend to, the one being decoded included. "dense" has none: it may be None.
        page_size: S of the policies that read pages, unless the name sets it.
        dense_layers: first layers that read everything, unless the name sets it; 0 for "quest-nodense".

    Raises:
        ValueError: an unknown name or field, a class that is no policy, or a value out of range.
    """
    kind_name, *settings = name.split(",")
    built_in = _BUILT_IN.get(kind_name) or _BuiltIn(_of_others(kind_name), "")
    options = {"page_size": page_size, "dense_layers": dense_layers} | built_in.options
    options |= _fields(built_in.kind, name, settings)
    if options["dense_layers"] < 0:
        raise ValueError(f"dense_layers must be at least 0, got {options['dense_layers']}")
    if built_in.kind.has_budget and budget is None:
        raise ValueError(f"policy {name} needs a budget, a number of tokens")
    policy = built_in.kind(name, budget if built_in.kind.has_budget else None, **options)
    if policy.budget is not None and policy.budget < policy.least_budget:
        raise ValueError(f"the budget of {name} must be at least {policy.least_budget} tokens, got {budget}")
    return policy


def _fields(kind: type[Policy], name: str, settings: list[str]) -> dict[str, Any]:
    """The fields that ``name`` sets, each as ``field=value``, with values of the fields' types."""
    if not settings:
        return {}
    types = get_type_hints(kind, localns=_TYPES)
    known = [one.name for one in fields(kind) if one.name not in ("name", "budget")]
    result: dict[str, Any] = {}
    for setting in settings:
        field_name, _, text = setting.partition("=")
        if field_name not in known:
            raise ValueError(f"{setting!r} in {name} must be field=value with a field of {', '.join(known)}")
        result[field_name] = _value(types[field_name], text, f"{field_name} in {name}")
    return result


def _value(kind: Any, text: str, what: str) -> Any:
    """``text`` as a value of a field's type: a number, a truth value, one of some words, or None."""
    choices = {str(choice): choice for choice in get_args(kind)} if get_origin(kind) is Literal else None
    optional = type(None) in get_args(kind)
    if optional:
        (kind,) = (one for one in get_args(kind) if one is not type(None))
        if text == "none":
            return None
        return _value(kind, text, what)
    if kind is bool:
        choices = {"true": True, "false": False}
    if choices is not None:
        if text not in choices:
            raise ValueError(f"{what} must be one of {', '.join(choices)}, got {text!r}")
        return choices[text]
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"{what} must be a number ({kind.__name__}), got {text!r}") from error


def _of_others(name: str) -> type[Policy]:
    """The class of a name that is not built in."""
    found = entry_points(group=ENTRY_POINTS)
    if name in found.names:
        loaded = found[name].load()
    elif ":" in name:
        loaded = _load(name)
    else:
        known = ", ".join([*NAMES, *sorted(found.names)])
        raise ValueError(f"policy must be one of {known}, or module:Class, got {name!r}")
    if not (isinstance(loaded, type) and issubclass(loaded, Policy)):
        raise ValueError(f"policy {name} must be a subclass of quest_eval.policies.Policy, got {loaded!r}")
    if inspect.isabstract(loaded):
        missing = ", ".join(sorted(loaded.__abstractmethods__))
        raise ValueError(f"policy {name} must define {missing}, see quest_eval.policies.Policy")
    return loaded


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:  # as `python -m` has it and a console script has not
        sys.path.insert(0, here)
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"policy {name} cannot be imported ({error})") from error
