"""A step's tokens as rows of the operators.

A step has requests with any number of new tokens, packed one after the other. Tokens of a prompt are dense and
generated tokens are sparse, whatever the chunks in which the scheduler computes them. So a request's result does not
depend on the requests beside it, on preemption or on the length of a chunk.

The host knows the number of new tokens of each request and decides from it. It reads no length from the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..ops import MAX_NEW_TOKENS


@dataclass(frozen=True)
class Rows:
    """Sparse tokens as R rows of at most T tokens.

    Attributes:
        page_table: [R, P] int32.
        start_lens, seq_lens: [R] int32, tokens in the cache before and after the row's.
        num_new: T.
        new_lens: [R] int32, real tokens of each row; None where each has T, or is idle.
        tokens, places: [n] int64, each token's place in the step and in the rows, [R * T]; None where they are equal.
    """

    page_table: Tensor
    start_lens: Tensor
    seq_lens: Tensor
    num_new: int
    new_lens: Tensor | None = None
    tokens: Tensor | None = None
    places: Tensor | None = None

    def pack(self, x: Tensor) -> Tensor:
        """[tokens of the step, H, D] as [R, T, H, D]; zeros where a row has fewer tokens."""
        rows = len(self.seq_lens)
        if self.tokens is None or self.places is None:
            return x[: rows * self.num_new].unflatten(0, (rows, self.num_new))
        packed = x.new_zeros((rows * self.num_new, *x.shape[1:]))
        packed.index_copy_(0, self.places, x.index_select(0, self.tokens))
        return packed.unflatten(0, (rows, self.num_new))

    def unpack(self, rows: Tensor, out: Tensor) -> None:
        """Write [R, T, H, D] into ``out``, [tokens of the step, H, D]."""
        flat = rows.flatten(0, 1)
        if self.tokens is None or self.places is None:
            out[: len(flat)].copy_(flat)
        else:
            out.index_copy_(0, self.tokens, flat.index_select(0, self.places))

    def token_lens(self) -> Tensor:
        """[R * T] int32: the tokens that each token sees, itself included; 0 for padding and idle rows."""
        t = torch.arange(self.num_new, dtype=torch.int32, device=self.seq_lens.device)
        lens = self.start_lens[:, None] + 1 + t
        return lens.where(lens <= self.seq_lens[:, None], 0).flatten()


@dataclass(frozen=True)
class DenseRows:
    """Tokens of prompts, which vLLM's own kernel attends for.

    Attributes:
        tokens: their places in the step: a slice, or [n] int64.
        metadata: vLLM's own metadata of a step with these tokens alone.
    """

    tokens: slice | Tensor
    metadata: Any


@dataclass(frozen=True)
class Step:
    """A step of the sparse layers.

    Attributes:
        page_table: [B, P] int32.
        start_lens, seq_lens: [B] int32.
        num_tokens: real tokens of the step.
        sparse, dense: its tokens by kind; None where there are none.
    """

    page_table: Tensor
    start_lens: Tensor
    seq_lens: Tensor
    num_tokens: int
    sparse: Rows | None
    dense: DenseRows | None


def count_sparse(
    query_lens: np.ndarray, seq_lens: np.ndarray | None, prompt_lens: np.ndarray | None, prefilling: np.ndarray | None
) -> np.ndarray:
    """How many of each request's new tokens are generated ones, its last.

    Args:
        query_lens: [B], new tokens.
        seq_lens: [B], tokens with the new ones, or a number that is larger where all new tokens are generated.
        prompt_lens: [B], tokens of the prompts; None where the engine does not tell.
        prefilling: [B] bool, whether the request is in its prefill; used where ``prompt_lens`` is None. None of both:
            a request is in its prefill if it has more new tokens than a decode step takes.
    """
    if prompt_lens is not None and seq_lens is not None:
        return np.clip(seq_lens - prompt_lens, 0, query_lens)
    if prefilling is None:
        prefilling = query_lens > MAX_NEW_TOKENS
    return np.where(prefilling, 0, query_lens)


def sparse_rows(
    query_lens: np.ndarray, num_sparse: np.ndarray, page_table: Tensor, start_lens: Tensor, seq_lens: Tensor
) -> Rows | None:
    """The rows of a step's sparse tokens, or None where it has none.

    Args:
        query_lens, num_sparse: [B], new tokens of each request, and how many of them, the last ones, are sparse.
        page_table: [B, P] int32.
        start_lens, seq_lens: [B] int32, on the device.
    """
    most = int(num_sparse.max(initial=0))
    if most == 0:
        return None
    T = min(most, MAX_NEW_TOKENS)
    # Whole requests of T tokens at the front of the step: views do, as for the decode steps of a CUDA graph. What
    # follows them are dense requests, or the idle rows of a graph, which have no token.
    count = int((num_sparse > 0).sum())
    if most <= T and (num_sparse[:count] == T).all() and (query_lens[:count] == T).all():
        if (query_lens[count:] == 0).all():
            count = len(query_lens)
        return Rows(page_table[:count], start_lens[:count], seq_lens[:count], T)
    # Otherwise a request's tokens are cut into rows of T.
    cuts = -(-num_sparse // T)
    request = np.repeat(np.arange(len(cuts)), cuts)
    done = T * (np.arange(len(request)) - np.repeat(np.cumsum(cuts) - cuts, cuts))
    new_lens = np.minimum(num_sparse[request] - done, T)
    behind = num_sparse[request] - done - new_lens  # the request's tokens after the row
    first = (np.cumsum(query_lens) - num_sparse)[request] + done
    real = np.arange(T) < new_lens[:, None]
    tokens = (first[:, None] + np.arange(T))[real]
    device = page_table.device
    index, lens = send(request, device), send(new_lens.astype(np.int32), device)
    seq = seq_lens.index_select(0, index) - send(behind.astype(np.int32), device)
    places = (send(tokens, device), send(np.flatnonzero(real), device))
    return Rows(page_table.index_select(0, index), seq - lens, seq, T, lens, *places)


def dense_tokens(query_lens: np.ndarray, num_sparse: np.ndarray) -> tuple[np.ndarray, slice | np.ndarray]:
    """The requests that have dense tokens, and these tokens' places in the step.

    Args:
        query_lens, num_sparse: as in :func:`sparse_rows`.
    """
    num_dense = query_lens - num_sparse
    ends = np.cumsum(query_lens)
    requests = np.flatnonzero(num_dense)
    starts = (ends - query_lens)[requests]
    counts = num_dense[requests]
    if len(requests) and (starts[1:] == (starts + counts)[:-1]).all():
        return requests, slice(int(starts[0]), int(starts[-1] + counts[-1]))
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return requests, np.repeat(starts, counts) + within


def send(numbers: np.ndarray, device: torch.device) -> Tensor:
    """Numbers of the host as a tensor of a device, sent without waiting for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(numbers))
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
