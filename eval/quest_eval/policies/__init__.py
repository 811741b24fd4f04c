"""The ways to decode from a long context that are compared: Quest with its variants, its rivals, and oracles.

Every policy runs through the same decoder (:mod:`quest_eval.decoding.policy_decoder`). The context is read densely and
the first layers are dense. All tokens behind the context are decoded one by one. A budget counts the decoded token.
"""

from .base import KVShape, LayerKV, LayerReader, Length, Policy
from .pages import PagePolicy, PageReader
from .registry import NAMES, make

__all__ = ["NAMES", "KVShape", "LayerKV", "LayerReader", "Length", "PagePolicy", "PageReader", "Policy", "make"]
