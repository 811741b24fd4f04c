"""Prefills long contexts once, then decodes behind them under any policy, as often as wanted."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..library import PAGE_SIZES
from ..policies import KVShape, LayerKV, Length, Policy
from ..policies.dense import DenseReader
from ..policies.snapkv import WINDOW
from . import attention_function
from .kv_usage import KVUsage, kv_usage
from .layer_attention import DecodeAttention, PrefillAttention
from .sliding_window import SlidingWindow

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..policies import LayerReader
    from .observers import Observer
    from .prefill_store import PrefillStore

# Tokens decoded between two checks that all answers have ended. Each check waits for the device.
_STEPS_PER_LOOK = 16


class PolicyDecoder:
    """A model and a batch of equally long contexts: prefilled once, then decoded behind under any policy.

    Question and answer are decoded token by token under the policy, as in the Quest paper. The layers that
    ``policy.is_dense`` names are dense. Each call starts anew behind the context. Keys and values are stored once,
    whatever the policy: a policy that evicts a token does not read it any more.

    While a decoder is in use the model cannot be used by itself. ``model.set_attn_implementation("sdpa")`` gives it
    back.

    Args:
        model: a transformers causal language model. Its sliding layers, if any, read their window under every policy.
        max_tokens: context, question and answer together.
        batch_size: the most contexts at a time.
        page_size: S of the dense layers, which they read all of.
        store: keeps prefills on disk, and gives back those that it has; None: each context is read anew.
        fingerprint: tells the model from others in the store, see :func:`quest_eval.models.fingerprint`.

    Raises:
        ValueError: a model or number that is not supported.
    """

    #: Called in each layer and decoding step of the next call; None costs nothing.
    observer: Observer | None = None

    def __init__(
        self,
        model: Any,
        *,
        max_tokens: int,
        batch_size: int = 1,
        page_size: int = 16,
        store: PrefillStore | None = None,
        fingerprint: str = "",
    ) -> None:
        if max_tokens < 1 or batch_size < 1:
            raise ValueError(f"max_tokens and batch_size must be at least 1, got {max_tokens} and {batch_size}")
        if page_size not in PAGE_SIZES:
            raise ValueError(f"page_size must be one of {', '.join(map(str, PAGE_SIZES))}, got {page_size}")
        if store is not None and not fingerprint:
            raise ValueError("a store of prefills needs the model's fingerprint, see quest_eval.models.fingerprint")
        config = attention_function.install(model)
        self.model, self.max_tokens, self.batch_size, self.page_size = model, max_tokens, batch_size, page_size
        self._store, self._fingerprint = store, fingerprint
        self.num_layers: int = config.num_hidden_layers
        kinds = attention_function.layer_kinds(config)
        #: The layers that policies rule, dense ones included: all but sliding ones.
        self.full_layers = tuple(index for index, kind in enumerate(kinds) if kind == "full_attention")
        D = attention_function.head_dim(config)
        self.shape = KVShape(config.num_attention_heads, config.num_key_value_heads, D, model.dtype.itemsize)
        capacity = -(-max_tokens // max(PAGE_SIZES)) * max(PAGE_SIZES)
        size = (self.num_layers, 2, batch_size, self.shape.kv_heads, capacity, D)
        self._storage = torch.empty(size, dtype=model.dtype, device=model.device)
        self._rotate = attention_function.rotation(model)
        self._layers: list[LayerKV] = []
        self._noted: frozenset[int] = frozenset()  # layers that note column sums
        self._usage: dict[Policy, KVUsage] = {}

    # The contexts

    @torch.inference_mode()
    def prefill(
        self,
        ids: Tensor,
        *,
        policies: Sequence[Policy],
        chunk: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Prefill contexts densely, one after the other, and forget earlier ones.

        Args:
            ids: int64 [B, L], B at most ``batch_size``.
            policies: those that will decode behind the contexts; the attention is noted as they need it.
            chunk: tokens of a context at a time; all of it by default, which is fastest. In float32 on a GPU a few
                thousand: PyTorch's attention with grouped heads holds all scores of a chunk there.
            progress: told the tokens read since its last call, B * L in all.

        Raises:
            ValueError: more than fits, or a policy that cannot run on this model.
        """
        B, L = ids.shape
        if not 1 <= B <= self.batch_size or not 1 <= L < self.max_tokens:
            raise ValueError(
                f"ids must have at most {self.batch_size} rows and {self.max_tokens - 1} columns, the room left in "
                f"max_tokens for what follows, and at least 1 of each, got {list(ids.shape)}"
            )
        for policy in policies:
            policy.check_num_layers(self.num_layers)
            if policy.needs_rotation and self._rotate is None:
                raise ValueError(
                    f"policy {policy.name} numbers rotary positions anew, and {type(self.model).__name__} has none"
                )
        first = min((policy.dense_layers for policy in policies if policy.needs_column_sums), default=self.num_layers)
        self._noted = frozenset(index for index in self.full_layers if index >= first)
        ids = ids.to(self.model.device)
        length = Length(B, L, ids.device)
        self._usage.clear()
        self._layers = [self._new_layer(index, length) for index in range(self.num_layers)]
        self._last_logits = torch.stack([self._read_row(row, ids[row], chunk or L, progress) for row in range(B)])

    def _new_layer(self, index: int, length: Length) -> LayerKV:
        B, L, heads = len(length.seq_lens), length.tokens, self.shape
        k, v = self._storage[index, :, :B]
        # SnapKV chooses by the last WINDOW queries, TOVA by the last one.
        last_queries = k.new_empty((B, heads.query_heads, min(L, WINDOW), heads.head_dim))
        sums = k.new_zeros((B, heads.kv_heads, L), dtype=torch.float32) if index in self._noted else None
        return LayerKV(k, v, length, L, heads.head_dim**-0.5, last_queries, sums, self._rotate)

    def _read_row(self, row: int, ids: Tensor, chunk: int, progress: Callable[[int], None] | None) -> Tensor:
        if self._store is None:
            return self._read_ids(row, ids, chunk, progress)
        key = self._key(ids, chunk)
        found = self._store.load(key)
        if found is None:
            logits = self._read_ids(row, ids, chunk, progress)
            self._store.save(key, self._tensors(row) | {"logits": logits}, self._notes())
            return logits
        if progress is not None:
            progress(len(ids))
        return self._restore(row, *found)

    def _read_ids(self, row: int, ids: Tensor, chunk: int, progress: Callable[[int], None] | None) -> Tensor:
        for start in range(0, len(ids), chunk):
            tokens = ids[None, start : start + chunk]
            logits = attention_function.forward(self.model, PrefillAttention(self._layers, row, start), tokens, start)
            if progress is not None:
                progress(tokens.shape[1])
        return logits[0]

    # A context on disk

    def _key(self, ids: Tensor, chunk: int) -> dict[str, Any]:
        """All that decides the bits of a prefill. Threads are left out: their rounding is noise."""
        return {
            "model": self._fingerprint,
            "tokens": hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest(),
            "length": len(ids),
            "dtype": str(self.model.dtype),
            "device": self.model.device.type,
            "torch": torch.__version__,
            "chunk": min(chunk, len(ids)),
            "noted": sorted(self._noted),
        }

    def _tensors(self, row: int) -> dict[str, Tensor]:
        """One context's keys, values and notes. The tensors of all layers are copies, but for those in the storage."""
        sums = [kv.column_sums[row] for kv in self._layers if kv.column_sums is not None]
        return {
            "keys_and_values": self._storage[:, :, row, :, : self._layers[0].context],
            "last_queries": torch.stack([kv.last_queries[row] for kv in self._layers]),
        } | ({"column_sums": torch.stack(sums)} if sums else {})

    def _notes(self) -> dict[str, str]:
        return {"layers": json.dumps([(kv.scale, kv.window) for kv in self._layers])}

    def _restore(self, row: int, tensors: dict[str, Tensor], notes: dict[str, str]) -> Tensor:
        """Fill one context's row; returns the logits behind it, [V]."""
        self._storage[:, :, row, :, : self._layers[0].context].copy_(tensors["keys_and_values"])
        sums = iter(tensors.get("column_sums", ()))
        for kv, queries, (scale, window) in zip(
            self._layers, tensors["last_queries"], json.loads(notes["layers"]), strict=True
        ):
            kv.scale, kv.window = scale, window
            kv.last_queries[row].copy_(queries)
            if kv.column_sums is not None:
                kv.column_sums[row].copy_(next(sums))
        return tensors["logits"].to(self.model.device)

    # Behind the contexts

    @torch.inference_mode()
    def generate(
        self,
        policy: Policy,
        ids: Tensor,
        max_new_tokens: int,
        eos: int | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> Tensor:
        """Greedy answers to questions, both decoded under the policy.

        Args:
            policy: one of those that the contexts were prefilled for.
            ids: int64 [B, T] the questions, T at least 1.
            max_new_tokens: tokens of each answer.
            eos: ends an answer, and fills it up.
            on_step: called after each step: one for each token of the question and of the answer, but for its last.

        Returns:
            int64 [B, max_new_tokens].

        Raises:
            ValueError: a policy that the prefill made no notes for, or more tokens than there is room for.
        """
        ids = self._check(ids, max_new_tokens - 1)
        step = self._start(policy, on_step)
        for t in range(ids.shape[1]):
            logits = step(ids[:, t])
        answer = ids.new_full((len(ids), max_new_tokens), 0 if eos is None else eos)
        done = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        for t in range(max_new_tokens):
            best = logits.argmax(-1)
            if eos is not None:
                best = best.masked_fill(done, eos)
                done |= best == eos
            answer[:, t] = best
            if t == max_new_tokens - 1 or (eos is not None and t % _STEPS_PER_LOOK == 0 and bool(done.all())):
                break
            logits = step(best)
        self._finish(policy)
        return answer

    @torch.inference_mode()
    def score(self, policy: Policy, ids: Tensor) -> Tensor:
        """Natural-log probabilities of a continuation that is decoded under the policy.

        Args:
            policy: one of those that the contexts were prefilled for.
            ids: int64 [B, T].

        Returns:
            float32 [B, T]: log p(ids[:, t] | the context, ids[:, :t]). The first follows from the context alone.

        Raises:
            ValueError: as :meth:`generate`.
        """
        ids = self._check(ids, 0)
        step, logits = self._start(policy), self._last_logits
        scores = torch.empty(ids.shape, device=ids.device)
        for t in range(ids.shape[1]):
            scores[:, t] = logits.float().log_softmax(-1).gather(1, ids[:, t : t + 1])[:, 0]
            if t < ids.shape[1] - 1:
                logits = step(ids[:, t])
        self._finish(policy)
        return scores

    def usage(self, policy: Policy) -> KVUsage:
        """The use of the KV cache by the last :meth:`generate` or :meth:`score` under this policy.

        Raises:
            ValueError: there was none since the contexts were prefilled.
        """
        if policy not in self._usage:
            raise ValueError(f"policy {policy.name} with budget {policy.budget} has not run on these contexts")
        return self._usage[policy]

    def _check(self, ids: Tensor, more: int) -> Tensor:
        if not self._layers:
            raise ValueError("the decoder has no context: call prefill(ids, policies=...) first")
        B, context = len(self._layers[0].k), self._layers[0].context
        if ids.dim() != 2 or ids.shape[0] != B or ids.shape[1] < 1 or more < 0:
            raise ValueError(f"ids must be [{B}, T], T and the new tokens at least 1, got {list(ids.shape)}")
        if context + ids.shape[1] + more > self.max_tokens:
            raise ValueError(
                f"max_tokens must be at least {context + ids.shape[1] + more}, for {context} tokens of context and "
                f"{ids.shape[1] + more} behind it, got {self.max_tokens}"
            )
        return ids.to(self.model.device)

    def _start(self, policy: Policy, on_step: Callable[[], None] | None = None) -> Callable[[Tensor], Tensor]:
        """A function that takes the next tokens [B] and gives the logits behind them, [B, V]."""
        length = self._layers[0].length
        length.set(self._layers[0].context)
        readers = [self._reader(index, kv, policy) for index, kv in enumerate(self._layers)]
        attention = DecodeAttention(readers, policy, self.observer)

        def step(tokens: Tensor) -> Tensor:
            length.set(length.tokens + 1)
            logits = attention_function.forward(self.model, attention, tokens[:, None], length.tokens - 1)
            if on_step is not None:
                on_step()
            return logits

        return step

    def _reader(self, index: int, kv: LayerKV, policy: Policy) -> LayerReader:
        if kv.window is not None:
            return SlidingWindow(kv)
        return DenseReader(kv, self.page_size) if policy.is_dense(index) else policy.at(index).start(kv)

    def _finish(self, policy: Policy) -> None:
        kv = self._layers[0]
        self._usage[policy] = kv_usage(policy, self.shape, self.full_layers, kv.context, kv.length.tokens)
