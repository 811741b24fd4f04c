"""The base of every policy: how one layer's keys and values are read, or evicted, while tokens are decoded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from quest_ops import PageView, page_view_bhld

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


@dataclass(frozen=True)
class KVShape:
    """The heads of one layer, from which bytes are counted."""

    query_heads: int
    kv_heads: int
    head_dim: int
    itemsize: int

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's keys and values, all KV heads."""
        return 2 * self.kv_heads * self.head_dim * self.itemsize


class Length:
    """The tokens in each sequence, once for the host and once for the device, so that neither waits for the other."""

    def __init__(self, batch: int, tokens: int, device: torch.device) -> None:
        self.tokens = tokens
        #: int32 [B].
        self.seq_lens = torch.full((batch,), tokens, dtype=torch.int32, device=device)

    def set(self, tokens: int) -> None:
        self.tokens = tokens
        self.seq_lens.fill_(tokens)


@dataclass
class LayerKV:
    """One layer's keys and values, with notes of its prefill. All policies share it."""

    #: [B, Hkv, capacity, D], keys with RoPE applied. The capacity is a multiple of every page size.
    k: Tensor
    v: Tensor
    length: Length
    #: Tokens of the densely read context.
    context: int
    #: Of the scores before the softmax.
    scale: float
    #: Tokens that a token of a sliding layer sees, itself included. None in full-attention layers, which policies rule.
    window: int | None = field(default=None, kw_only=True)
    #: [B, Hq, W, D]: the queries of the context's last tokens.
    last_queries: Tensor
    #: float32 [B, Hkv, context]: the attention that each token received from all of the context's queries, summed over
    #: the query heads of a group. None where no policy asked for it.
    column_sums: Tensor | None = None
    #: Rotates keys [..., n, D] as if they were ``positions`` (an int) tokens later; None where the model has no RoPE.
    rotate: Callable[[Tensor, int], Tensor] | None = None
    _views: dict[int, PageView] = field(default_factory=dict)

    def pages(self, page_size: int) -> PageView:
        """The same memory as pages, as the operators of quest_ops take it."""
        if page_size not in self._views:
            self._views[page_size] = page_view_bhld(self.k, self.v, page_size)
        return self._views[page_size]


class LayerReader(ABC):
    """A policy at work in one layer, from the end of the context on."""

    #: The last step's selection, for observers: logical pages int32 [B, Hs, K], -1 padded, or tokens int64 [B, Hs, n].
    #: Both are None where the step read everything.
    pages: Tensor | None = None
    tokens: Tensor | None = None

    def __init__(self, kv: LayerKV) -> None:
        self.kv = kv

    @abstractmethod
    def attend(self, q: Tensor) -> Tensor:
        """Attention of the newest token, which is in ``kv`` already: q [B, Hq, D] -> [B, Hq, D]."""


@dataclass(frozen=True)
class Policy(ABC):
    """A method and its budget.

    A subclass defines :meth:`label` and :meth:`start`, and overrides the three counts at the end where they differ. The
    base of policies that select pages is :class:`quest_eval.policies.PagePolicy`.

    Args:
        name: as on the command line.
        budget: tokens that a head may attend to, the one being decoded included; None: all.
        page_size: S, where the policy reads pages.
        dense_layers: first layers that read everything.
    """

    #: Whether the policy has a budget; without one it reads everything.
    has_budget: ClassVar[bool] = True
    #: Whether the prefill has to note the column sums of the attention.
    needs_column_sums: ClassVar[bool] = False
    #: Whether keys must be moved to other positions, which takes a model with RoPE.
    needs_rotation: ClassVar[bool] = False

    name: str
    budget: int | None
    page_size: int = 16
    dense_layers: int = 2

    @abstractmethod
    def label(self) -> str:
        """The name in tables and plots."""

    @abstractmethod
    def start(self, kv: LayerKV) -> LayerReader:
        """A reader that begins behind the context of ``kv``, and leaves the context as it is."""

    def at(self, layer: int) -> Policy:  # noqa: ARG002
        """The policy of one layer, where they differ."""
        return self

    def is_dense(self, layer: int) -> bool:
        """Whether a layer reads everything."""
        return layer < self.dense_layers

    def check_num_layers(self, num_layers: int) -> None:  # noqa: B027 - most policies go with any model
        """Raises ValueError where the policy is for models of another number of layers."""

    @property
    def limit(self) -> int:
        """The budget, of a policy that has one."""
        assert self.budget is not None
        return self.budget

    @property
    def least_budget(self) -> int:
        """The smallest budget in tokens with which the policy works."""
        return 2

    def tokens_attended(self, context: int, length: int) -> int:  # noqa: ARG002 (the context counts in others)
        """Tokens that a head attends to in the step that makes a sequence ``length`` tokens long."""
        return length if self.budget is None else min(self.budget, length)

    def bytes_read(self, shape: KVShape, context: int, length: int) -> int:
        """Bytes of keys, values and metadata that this step reads of one sequence and layer."""
        return self.tokens_attended(context, length) * shape.token_bytes

    def bytes_held(self, shape: KVShape, context: int, length: int) -> int:  # noqa: ARG002
        """Bytes of keys, values and metadata that are kept of one sequence and layer after this step."""
        return length * shape.token_bytes
