"""Quest attention over a paged cache, and the decision between prefill, dense and sparse.

The algorithm is Quest's (Tang et al., ICML 2024). The prefill and the first layers are dense. Elsewhere a decoded token
reads only the pages whose keys may score highest.
"""

from __future__ import annotations

from numbers import Real
from typing import Literal, NamedTuple

import torch
from torch import SymFloat, Tensor

from ._autograd import refuse_backward
from .config import LayerPages, QuestConfig
from .dense import Features, attend, attend_by_position, past_of_pages
from .kv_state import StepCache
from .ops import MAX_NEW_TOKENS, estimate, rerank_pages, sparse_decode, topk_pages
from .report import LayerPlan, Report

#: How a layer's attention runs.
Path = Literal["prefill", "dense", "sparse"]
# The name in the error that refuses backward.
_NAME = "quest_attention over a cache"


class Decision(NamedTuple):
    """How a layer's attention runs, and the rule that decides it.

    Attributes:
        path: "prefill" and "dense" read the whole context, "sparse" at most the budget.
        rule: "many new tokens" are a prefill. A "feature" that the operators lack, a "dense layer" of the configuration
            and a cache that "fits the budget" run dense. So does a cache that is "always short", within
            ``dense_below``. All else is "over the budget".
    """

    path: Path
    rule: Literal["many new tokens", "feature", "dense layer", "fits the budget", "always short", "over the budget"]


def decide(config: QuestConfig, layer: int, pages: int, num_new: int = 1, lacks_feature: bool = False) -> Decision:
    """The one place that decides between prefill, dense and sparse.

    Args:
        config: of the selection, for all layers.
        layer: index of the layer.
        pages: P, logical pages that a sequence may have. Its length is on the device, so it cannot decide.
        num_new: T.
        lacks_feature: whether the layer needs a feature that the operators lack, such as a sliding window.
    """
    if num_new > MAX_NEW_TOKENS:
        return Decision("prefill", "many new tokens")
    if lacks_feature:
        return Decision("dense", "feature")
    if config.is_dense(layer):
        return Decision("dense", "dense layer")
    if pages <= config.at(layer).num_pages:
        return Decision("dense", "fits the budget")
    if pages * config.page_size <= config.dense_below:
        return Decision("dense", "always short")
    return Decision("sparse", "over the budget")


def attention_path(cache: StepCache, layer: int, config: QuestConfig, num_new: int = 1) -> Path:
    """The path of :func:`quest_attention` for ``num_new`` tokens in this layer.

    "prefill" and "dense" read the whole context. "sparse" reads at most the layer's budget of it.

    Raises:
        ValueError: a list of budgets for another number of layers.
    """
    config.check_num_layers(cache.num_layers)
    return decide(config, layer, cache.pages_per_sequence, num_new).path


def layer_plan(cache: StepCache, layer: int, config: QuestConfig) -> LayerPlan:
    """How :func:`quest_attention` decodes in this layer, and why."""
    config.check_num_layers(cache.num_layers)
    path, rule = decide(config, layer, cache.pages_per_sequence)
    listed, config = isinstance(config.budget, tuple), config.at(layer)
    reasons = {
        "dense layer": "a budget of 0" if listed else f"one of the first {config.dense_layers} layers",
        "fits the budget": f"the budget of {config.budget} tokens holds the cache's {cache.max_tokens}",
        "always short": f"the cache's {cache.max_tokens} tokens are within dense_below, {config.dense_below}",
        "over the budget": f"at most {config.budget} tokens of {cache.max_tokens}",
    }
    if config.selector is not None:
        reasons["over the budget"] = f"pages of config.selector, of {cache.max_tokens} tokens"
    return LayerPlan(layer, path, reasons[rule])


def attention_report(cache: StepCache, config: QuestConfig) -> Report:
    """The pages and bytes that each layer read since ``cache.start_report()``. Synchronises; prints as a table.

    Raises:
        RuntimeError: the cache does not count.
    """
    if cache.counts is None:
        raise RuntimeError("the cache has counted nothing: call cache.start_report() before the steps to report")
    return cache.counts.read([layer_plan(cache, layer, config) for layer in range(cache.num_layers)])


def select_pages(
    q: Tensor,
    k_bounds: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    config: QuestConfig,
    scale: float | None = None,
    k_scales: Tensor | None = None,
    codes: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The pages that Quest reads: :func:`quest_ops.estimate`, then :func:`quest_ops.topk_pages`.

    With ``config.candidates`` the selected pages are candidates. :func:`quest_ops.ops.rerank_pages` scores them again,
    and a second :func:`quest_ops.topk_pages` selects those of the budget.

    ``config.selector`` is not called, so that a selector may call this.

    Args:
        q: [B, Hq, D], or [B, T, Hq, D] for the last T (1 to 8) tokens of each sequence.
        k_bounds: [N, Hkv, 2, D].
        page_table: [B, P] int32.
        seq_lens: [B] int32, tokens in the cache, those of q included.
        scale: the attention's softmax scale, 1 / sqrt(D) by default; only group_reduce "soft" depends on it.
        k_scales: [N, Hkv] float32, for int8 k_bounds.
        codes: k_codes [N, Hkv, S, D / 4] uint8 and code_scales [N, Hkv, S] float32, for ``config.candidates``.

    Returns:
        int32 [B, Hs, K] or [B, T, Hs, K] with K = config.most_pages: logical pages, ascending, -1 at the end where
        there are fewer. Hs is Hq for group_reduce "none", else Hkv.

    Raises:
        RuntimeError: as the operators.
        ValueError: ``config.candidates`` without codes.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if config.is_window:  # bounds need not be read
        scores = q.new_zeros((*q.shape[:-1], page_table.shape[1]), dtype=torch.float32)
    else:
        scores = estimate(q, k_bounds, page_table, seq_lens, config.page_size, k_scales)
    if config.candidate_pages:
        if codes is None:
            raise ValueError("codes must be given with config.candidates, got None")
        candidates = _best_pages(scores, seq_lens, k_bounds.shape[1], config, scale, config.candidate_pages)
        scores = rerank_pages(q, *codes, page_table, seq_lens, candidates)
    return _best_pages(scores, seq_lens, k_bounds.shape[1], config, scale)


def choose_pages(
    layer: int, q: Tensor, pages: LayerPages, config: QuestConfig, codes: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """The pages that a sparse layer reads: those of ``config.selector``, or Quest's.

    Args:
        layer: its index.
        q: [B, T, Hq, D].
        pages: of the layer.
        config: of the selection in this layer.
        codes: as in :func:`select_pages`.

    Returns:
        int32 [B, T, Hs, K]: all pages of a sequence of at most ``config.dense_below`` tokens.

    Raises:
        ValueError: the selector returned neither int32 pages nor float32 scores.
        RuntimeError: as the operators.
    """
    _, _, k_bounds, k_scales, page_table, seq_lens, scale = pages
    if config.selector is None:
        return select_pages(q, k_bounds, page_table, seq_lens, config, scale, k_scales, codes)
    chosen = config.selector(layer, q, pages, config)
    if chosen.dtype == torch.float32:
        return _best_pages(chosen, seq_lens, k_bounds.shape[1], config, scale)
    if chosen.dtype != torch.int32:
        raise ValueError(f"config.selector must return int32 pages or float32 scores, got {chosen.dtype}")
    return chosen if config.dense_below == 0 else _short_rows_whole(chosen, seq_lens, config)


def _best_pages(
    scores: Tensor, seq_lens: Tensor, num_kv_heads: int, config: QuestConfig, scale: float, candidates: int = 0
) -> Tensor:
    """The pages of the budget, or ``candidates`` pages in every sequence."""
    num_pages, group_reduce, sink_pages, recent_pages = config.selection
    return topk_pages(
        scores,
        seq_lens,
        config.page_size,
        candidates or num_pages,
        num_kv_heads,
        group_reduce,
        sink_pages,
        recent_pages,
        scale,
        dense_below=0 if candidates else config.dense_below,
    )


def _short_rows_whole(pages: Tensor, seq_lens: Tensor, config: QuestConfig) -> Tensor:
    """A selector's pages [B, T, Hs, K], with all pages in the rows of at most ``config.dense_below`` tokens."""
    T, K = pages.shape[1], max(pages.shape[3], -(-config.dense_below // config.page_size))
    place = torch.arange(K, dtype=torch.int32, device=pages.device)
    behind = torch.arange(T - 1, -1, -1, dtype=torch.int32, device=pages.device)
    last = torch.div(seq_lens[:, None] - behind - 1, config.page_size, rounding_mode="floor")
    all_pages = torch.where(place <= last[:, :, None], place, -1)[:, :, None]
    is_short = (seq_lens <= config.dense_below)[:, None, None, None]
    return torch.where(is_short, all_pages, torch.nn.functional.pad(pages, (0, K - pages.shape[3]), value=-1))


def quest_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: StepCache,
    layer: int,
    config: QuestConfig,
    scale: float | None = None,
) -> Tensor:
    """Appends the step's keys and values to a layer of the cache, then attends causally over the layer.

    Call ``cache.advance(T)`` once a step, before the layers. No length is read on the host, so this works under
    torch.compile (fullgraph) and in CUDA graphs.

    A step of 1 to 8 tokens is a decode step. Quest, or ``config.selector``, selects pages for each token. The first
    ``config.dense_layers`` layers are dense, or those with a budget of 0, and so is a cache whose capacity fits the
    budget. A sequence no longer than the budget or ``config.dense_below`` reads all its pages, with the dense result
    bit for bit. In a ragged step that is decided for each token, by the tokens up to it.

    More tokens are a prefill and dense. Where all sequences start empty, PyTorch's causal attention runs on q, k and v
    as they are. Otherwise it runs over a contiguous copy of the layer's keys and values, with a mask for at most 512
    queries at a time. The copy is as long as the longest sequence by the host's account, and as the cache's capacity in
    compiled and captured code. On CUDA it has a head for each query head.

    Args:
        q: [B, T, Hq, D], or [B, Hq, D] for one token.
        k, v: [B, T, Hkv, D], or [B, Hkv, D]. Keys with RoPE applied.
        cache: a PagedKVCache or a CacheView. A row's tokens past its ``new_lens`` are padding.
        layer: index of the layer in the cache.
        config: its page_size, bounds and std_factor must be the cache's; a list of budgets has one for each layer.
        scale: of the scores before the softmax, 1 / sqrt(D) by default.

    Returns:
        Like q; 0 for padding.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together, before anything is written.
        RuntimeError: ``cache.advance`` was not called for this step, or the layer was left out of an earlier one; or as
            the operators. Backward raises it too, but for the prefill of an empty cache.
    """
    _check(q, k, v, cache, config, scale)
    if q.dim() == 3:
        return quest_attention(q[:, None], k[:, None], v[:, None], cache, layer, config, scale)[:, 0]
    path, config = attention_path(cache, layer, config, q.shape[1]), config.at(layer)
    if path != "prefill" and not cache.ragged and (path == "dense" or config.in_one_call):
        out = _decode_step(q, k, v, cache, layer, config if path == "sparse" else None, scale)
        return refuse_backward(_NAME, out, q, k, v)
    cache.append(layer, k, v)
    if path == "prefill" and cache.counts is not None:
        cache.counts.record_prefill(layer)
    if path == "prefill" and cache.starts_empty:
        return _prefill_first(q, k, v, cache, scale)
    if path == "prefill":
        out = _prefill_next(q, cache, layer, scale)
    else:
        out = _decode(q, cache, layer, config if path == "sparse" else None, scale)
    # The cache stores values only, so gradients of the keys and values would be lost silently.
    return refuse_backward(_NAME, out, q, k, v)


def _check(q: Tensor, k: Tensor, v: Tensor, cache: StepCache, config: QuestConfig, scale: float | None) -> None:
    for name in ("page_size", "bounds", "std_factor"):
        if getattr(config, name) != getattr(cache, name):
            raise ValueError(f"config.{name} must be the cache's, {getattr(cache, name)}, got {getattr(config, name)}")
    if config.candidates and cache.k_codes is None:
        raise ValueError(
            f"config.candidates must be 0 with a cache that has no codes, got {config.candidates}: make the cache with "
            f"codes=True"
        )
    if config.kept_pages > cache.kept_pages:
        raise ValueError(
            f"config.reselect_every must be 1 with a cache that keeps lists of {cache.kept_pages} pages, got "
            f"{config.reselect_every}: make the cache with kept_pages=config.kept_pages, {config.kept_pages}"
        )
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor, got {tensor!r}")
    if q.dim() not in (3, 4):
        raise ValueError(f"q must have shape [B, Hq, D] or [B, T, Hq, D], got {list(q.shape)}")
    if scale is not None and not (isinstance(scale, (Real, SymFloat)) and abs(scale) <= torch.finfo(torch.float32).max):
        raise ValueError(f"scale must be a finite number, or None, got {scale!r}")
    B, Hkv, D = cache.page_table.shape[0], cache.num_kv_heads, cache.head_dim
    T = list(q.shape[1:-2])
    if q.shape[0] != B or q.shape[-1] != D or q.shape[-2] == 0 or q.shape[-2] % Hkv != 0:
        wanted = [B, *T, f"a multiple of {Hkv}", D]
        raise ValueError(f"q must have shape [{', '.join(map(str, wanted))}] to go with the cache, got {list(q.shape)}")
    for name, tensor in (("k", k), ("v", v)):
        if list(tensor.shape) != [B, *T, Hkv, D]:
            raise ValueError(f"{name} must have shape {[B, *T, Hkv, D]} to go with q, got {list(tensor.shape)}")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dtype != cache.k_cache.dtype or tensor.device != cache.device:
            raise ValueError(
                f"{name} must be {cache.k_cache.dtype} on {cache.device} like the cache, "
                f"got {tensor.dtype} on {tensor.device}: convert it, or make the cache of the dtype and device that "
                f"the model computes in (under torch.autocast, the dtype of autocast)"
            )


def _decode_step(
    q: Tensor, k: Tensor, v: Tensor, cache: StepCache, layer: int, config: QuestConfig | None, scale: float | None
) -> Tensor:
    """A step in one call. Dense layers have no config."""
    cache.claim_step(layer, k)
    out, _, pages = cache.state.decode_step(layer, q, k, v, cache.start_lens, cache.seq_lens, config, scale)
    cache.step_written(layer)
    if cache.counts is not None:
        selects = cache.state.selects(config, q.shape[1])
        cache.counts.record(layer, pages, cache.seq_lens, q.shape[1], config is not None, selects=selects)
    return out


def _decode(q: Tensor, cache: StepCache, layer: int, config: QuestConfig | None, scale: float | None) -> Tensor:
    """Decoding over tokens that the cache already has: ragged rows and windows. Dense layers have no config."""
    k_cache, v_cache, k_bounds, k_scales = cache.layer(layer)
    page_table, seq_lens, rows, num_new = cache.page_table, cache.seq_lens, q, q.shape[1]
    if cache.ragged:
        # The operators take a row's last tokens for the new ones, but padding comes last here. So each token becomes a
        # sequence that ends with it, and padding an empty one.
        seq_lens = torch.where(_is_real(q, cache), _positions(q, cache, first=1), 0).flatten()
        page_table = page_table.repeat_interleave(q.shape[1], 0)
        rows, num_new = q.flatten(0, 1)[:, None], 1
    pages = None
    if config is not None:
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        view = LayerPages(k_cache, v_cache, k_bounds, k_scales, page_table, seq_lens, scale)
        pages = choose_pages(layer, rows, view, config, cache.state.codes(layer))
    if cache.counts is not None:
        how = (False, 0) if config is None else (config.reads_bounds, config.candidate_pages)
        cache.counts.record(layer, pages, seq_lens, num_new, *how)
    out, _ = sparse_decode(rows, k_cache, v_cache, page_table, seq_lens, pages, scale)
    return out.view(q.shape)


def _prefill_first(q: Tensor, k: Tensor, v: Tensor, cache: StepCache, scale: float | None) -> Tensor:
    padding = ~_is_real(q, cache)[:, :, None, None] if cache.ragged else None
    if padding is not None:
        # Padding comes after all tokens and has a weight of 0, but 0 times NaN is NaN.
        k, v = k.masked_fill(padding, 0), v.masked_fill(padding, 0)
    out = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, Features(scale))
    return out if padding is None else out.masked_fill(padding, 0)


def _prefill_next(q: Tensor, cache: StepCache, layer: int, scale: float | None) -> Tensor:
    """The prefill of sequences that are not empty, over a contiguous copy of their pages."""
    table = cache.page_table[:, : cache.pages_in_use].clamp(min=0)
    k_cache, v_cache, *_ = cache.layer(layer)
    past = past_of_pages((pool[table] for pool in (k_cache, v_cache)), cache.seq_lens)
    unwritten = (past.position < 0)[:, None, :, None]
    for tokens in (past.k, past.v):
        tokens.masked_fill_(unwritten, 0)  # it has a weight of 0, but may hold NaN, and 0 times NaN is NaN
    out = attend_by_position(q.transpose(1, 2), past, _positions(q, cache), Features(scale))
    return out.masked_fill(~_is_real(q, cache)[:, :, None, None], 0) if cache.ragged else out


def _is_real(q: Tensor, cache: StepCache) -> Tensor:
    """Bool [B, T]: whether a token is real, not padding."""
    return torch.arange(q.shape[1], dtype=torch.int32, device=q.device) < cache.new_lens[:, None]


def _positions(q: Tensor, cache: StepCache, first: int = 0) -> Tensor:
    """int32 [B, T]: the position of each of the step's tokens in its sequence, counted from ``first``."""
    return cache.start_lens[:, None] + torch.arange(first, q.shape[1] + first, dtype=torch.int32, device=q.device)
