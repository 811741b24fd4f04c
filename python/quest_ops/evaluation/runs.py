"""One text, read once, then asked about under many policies."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..attention import QuestConfig
from ..transformers import enable_quest
from .demo_policies import Policy, dense
from .needles import KEY_DIGITS, Fact

if TYPE_CHECKING:
    from collections.abc import Callable

# Room behind the text for a question and its answer.
_QUESTION_TOKENS = 128


@dataclass(frozen=True)
class Answer:
    text: str
    right: bool
    #: One entry a decoding step, the question's tokens included.
    seconds: list[float]


@dataclass(frozen=True)
class Reading:
    """Which pages were read while one answer was decoded."""

    fact: Fact
    policy: Policy
    answer: Answer
    #: [L, Hkv, P]: for how many of the answer's tokens a layer and KV head read a page.
    counts: Tensor
    #: Layers that read everything.
    dense_layers: list[int]
    #: Tokens in the cache at the end.
    length: int


class Reader:
    """A model with a text in its cache. Questions are decoded token by token and forgotten after the answer."""

    def __init__(self, model: Any, max_text_tokens: int, page_size: int) -> None:
        self.model = model
        config = model.config
        self.num_layers: int = config.num_hidden_layers
        self.num_kv_heads: int = config.num_key_value_heads
        self.head_dim: int = config.head_dim
        self.text_tokens = 0
        self._dense = dense(self.num_layers, page_size)
        any_config = QuestConfig(budget=page_size, page_size=page_size)  # each reading brings its own
        self.cache = enable_quest(model, any_config, max_tokens=max_text_tokens + _QUESTION_TOKENS)

    @property
    def kv_bytes(self) -> int:
        """Bytes of one layer's keys and values of the text."""
        return 2 * self.text_tokens * self.num_kv_heads * self.head_dim * self.model.dtype.itemsize

    def read(self, text: bytes, chunk: int, progress: Callable[[int], None] = lambda _: None) -> None:
        """Prefill ``text`` densely, ``chunk`` tokens at a time; ``progress`` is told how many have been added."""
        self.cache.quest_config = self._dense.config
        for start in range(0, len(text), chunk):
            piece = text[start : start + chunk]
            self._step(piece)
            self.text_tokens += len(piece)
            progress(len(piece))

    def ask(self, fact: Fact, policy: Policy) -> Answer:
        """The model's answer to the fact's question, every token of question and answer decoded under ``policy``."""
        self.cache.quest_config = policy.config
        answer, seconds = bytearray(), []
        pending = list(fact.question)
        while len(answer) < KEY_DIGITS:
            start = time.perf_counter()
            best = self._step(bytes([pending.pop(0)]))
            seconds.append(time.perf_counter() - start)
            if not pending:
                answer.append(best)
                pending.append(best)
        self.cache.crop(-len(seconds))
        text = "".join(chr(byte) if 33 <= byte < 127 else "." for byte in answer)
        return Answer(text, text == fact.key, seconds)

    def watch(self, fact: Fact, policy: Policy) -> Reading:
        """Ask once more, noting the pages that are read for the answer's tokens."""
        question_end = self.text_tokens + len(fact.question)
        num_pages = -(-(question_end + KEY_DIGITS) // policy.config.page_size)
        counts = torch.zeros(self.num_layers, self.num_kv_heads, num_pages, dtype=torch.int32)
        dense_layers: set[int] = set()
        length = 0

        def note(layer: int, pages: Tensor | None, tokens: int) -> None:
            nonlocal length
            length = tokens
            if tokens < question_end:
                return
            if pages is None:
                dense_layers.add(layer)
                counts[layer, :, : -(-tokens // policy.config.page_size)] += 1
                return
            for head, row in enumerate(pages[0, 0].tolist()):
                # A list of a query head counts for the KV head that it reads from.
                kv_head = head * self.num_kv_heads // pages.shape[2]
                counts[layer, kv_head, [page for page in row if page >= 0]] += 1

        self.cache.observer = note
        try:
            answer = self.ask(fact, policy)
        finally:
            self.cache.observer = None
        return Reading(fact, policy, answer, counts, sorted(dense_layers), length)

    @torch.inference_mode()
    def _step(self, tokens: bytes) -> int:
        ids = torch.tensor([list(tokens)], device=self.model.device)
        logits = self.model(ids, past_key_values=self.cache, logits_to_keep=1).logits
        return int(logits[0, -1].argmax())
