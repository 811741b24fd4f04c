"""The ways to decode from a long context that are compared: Quest with its variants, its rivals, and oracles.

Every policy runs through the same model path (:mod:`quest_ops.evaluation.session`): the context is read densely, the
first layers are dense, and what follows is decoded token by token. A budget counts the token being decoded.
"""

from __future__ import annotations

from typing import Any

from .base import KVShape, LayerKV, LayerReader, Length, Policy
from .dense import Dense
from .h2o import H2O
from .oracle import PageOracle, TokenOracle
from .quest import Quest
from .snapkv import SnapKV
from .sparq import SparQ
from .streaming import SINKS, Streaming
from .tova import TOVA

#: Names on the command line, and what they mean.
NAMES: dict[str, str] = {
    "dense": "the whole cache",
    "quest": "Quest, a list for each KV head: the maximum of its query heads' scores",
    "quest-head": "Quest, a list for each query head, as in the paper",
    "quest-sum": "Quest, a list for each KV head: the sum of its query heads' scores",
    "quest-soft": "Quest, a list for each KV head: the sum of its query heads' scores softmaxed over the pages",
    "quest-shared": "Quest, one list for all heads, as in SGLang",
    "quest-meanstd": "quest, by mean and standard deviation of a page's keys in place of minimum and maximum",
    "quest-int8": "quest, with bounds of 8 bits, as QuestConfig has it by default",
    "quest-nodense": "quest, in the first layers as well",
    "h2o": "H2O: the tokens that received most attention, and the latest; others are evicted",
    "tova": "TOVA: the token that the newest attends to least is evicted",
    "streaming": "StreamingLLM: 4 first tokens and the latest, positions numbered anew",
    "sparq": "SparQ: tokens chosen by the largest components of the query, the rest by the mean value",
    "snapkv": "SnapKV: the context thinned out once, by what its end attends to",
    "page-oracle": "the pages with the best exact scores, for each query head",
    "token-oracle": "the tokens with the best exact scores, for each query head",
}
_QUEST: dict[str, dict[str, Any]] = {
    "quest": {},
    "quest-head": {"group_reduce": "none"},
    "quest-sum": {"group_reduce": "sum"},
    "quest-soft": {"group_reduce": "soft"},
    "quest-shared": {"shared": True},
    "quest-meanstd": {"bounds": "meanstd"},
    "quest-int8": {"bounds": "int8"},
    "quest-nodense": {"dense_layers": 0},
}
_OTHERS: dict[str, type[Policy]] = {
    "h2o": H2O,
    "tova": TOVA,
    "streaming": Streaming,
    "sparq": SparQ,
    "snapkv": SnapKV,
    "page-oracle": PageOracle,
    "token-oracle": TokenOracle,
}


def make(name: str, budget: int | None, *, page_size: int = 16, dense_layers: int = 2) -> Policy:
    """The policy of that name.

    Args:
        name: one of :data:`NAMES`.
        budget: tokens a head may attend to, the one being decoded included. "dense" has none: it may be None.
        page_size: S of the policies that read pages.
        dense_layers: first layers that read everything; 0 for "quest-nodense" whatever is given.

    Raises:
        ValueError: a name, budget or page size that cannot be.
    """
    if name not in NAMES:
        raise ValueError(f"policy must be one of {', '.join(NAMES)}, got {name!r}")
    if dense_layers < 0:
        raise ValueError(f"dense_layers must be at least 0, got {dense_layers}")
    if name == "dense":
        return Dense(name, None, page_size, dense_layers)
    if budget is None:
        raise ValueError(f"policy {name} needs a budget, a number of tokens")
    if name in _QUEST:
        options = dict(_QUEST[name])
        return Quest(name, budget, page_size, options.pop("dense_layers", dense_layers), **options)
    # Room for the sinks of StreamingLLM and a token, and for two halves everywhere else; whole pages for the oracle.
    least = {"streaming": SINKS + 1, "page-oracle": page_size}.get(name, 2)
    if budget < least:
        raise ValueError(f"the budget of {name} must be at least {least} tokens, got {budget}")
    return _OTHERS[name](name, budget, page_size, dense_layers)


__all__ = ["NAMES", "KVShape", "LayerKV", "LayerReader", "Length", "Policy", "make"]
