"""The specification: Quest (Tang et al., ICML 2024) in float64 and plain PyTorch, written to be read with the paper.

Every operator is judged against these functions. They take the operators' tensors, whose shapes are in
:mod:`quest_ops.ops`, and return new tensors instead of writing into their arguments. They loop where a loop is clearer
and share no code with the kernels.

The ``T`` new tokens are the last ``T`` of the sequence; a ``q`` of three dimensions is one new token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor


def visible_by_token(seq_lens: Tensor, num_new: int, new_lens: Tensor | None = None) -> list[list[int]]:
    """Tokens that each of a sequence's new tokens sees: [B, T]. The first ``new_lens`` are real; padding sees none."""
    real = [num_new] * len(seq_lens) if new_lens is None else new_lens.tolist()
    return [
        [visible_tokens(length, t, n) if t < n else 0 for t in range(num_new)]
        for length, n in zip(seq_lens.tolist(), real, strict=True)
    ]


def visible_tokens(length: int, t: int, num_new: int) -> int:
    """The number of tokens that new token ``t`` of ``num_new`` may attend to: those before it, and itself."""
    return max(0, length - (num_new - 1 - t))


def num_pages(tokens: int, page_size: int) -> int:
    """The pages that hold ``tokens`` tokens."""
    return math.ceil(tokens / page_size)


def append_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_bounds: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    new_lens: Tensor | None = None,
    k_scales: Tensor | None = None,
    std_factor: float | None = None,
) -> tuple[Tensor, ...]:
    """Write k, v [B, T, Hkv, D] behind ``seq_lens`` and recompute the bounds of each page touched.

    Returns:
        k_cache, v_cache and k_bounds, and k_scales where it is given.
    """
    k_cache, v_cache = k_cache.clone(), v_cache.clone()
    page_size = k_cache.shape[2]
    counts = torch.full_like(seq_lens, k.shape[1]) if new_lens is None else new_lens
    for b, (length, count) in enumerate(zip(seq_lens.tolist(), counts.tolist(), strict=True)):
        for t in range(count):
            page, slot = divmod(length + t, page_size)
            physical = int(page_table[b, page])
            k_cache[physical, :, slot] = k[b, t]
            v_cache[physical, :, slot] = v[b, t]
    # A sequence without new tokens touches no page: its first token to update is past its last page.
    first_token = torch.where(counts > 0, seq_lens, torch.iinfo(torch.int32).max)
    paging = (page_table, seq_lens + counts, first_token)
    if k_scales is None:
        return k_cache, v_cache, update_bounds(k_cache, k_bounds, *paging, std_factor)
    return k_cache, v_cache, *update_scaled_bounds(k_cache, k_bounds, k_scales, *paging, std_factor)


def update_bounds(
    k_cache: Tensor,
    k_bounds: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    first_token: Tensor | None = None,
    std_factor: float | None = None,
) -> Tensor:
    """k_bounds in the cache's dtype: :func:`bounds_of` the keys of each page, from that of ``first_token`` on."""
    k_bounds = k_bounds.clone()
    for physical, keys in _pages_of_keys(k_cache, page_table, seq_lens, first_token):
        k_bounds[physical] = bounds_of(keys, std_factor).to(k_bounds.dtype)
    return k_bounds


def update_scaled_bounds(
    k_cache: Tensor,
    k_bounds: Tensor,
    k_scales: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    first_token: Tensor | None = None,
    std_factor: float | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`update_bounds` in 8 or 4 bits, as the dtype of k_bounds says, and their float32 k_scales [N, Hkv]."""
    k_bounds, k_scales = k_bounds.clone(), k_scales.clone()
    packed = k_bounds.dtype == torch.uint8
    for physical, keys in _pages_of_keys(k_cache, page_table, seq_lens, first_token):
        whole, scale = quantize(bounds_of(keys, std_factor), 4 if packed else 8, outward=std_factor is None)
        k_bounds[physical], k_scales[physical] = pack(whole) if packed else whole, scale
    return k_bounds, k_scales


def bounds_of(keys: Tensor, std_factor: float | None = None) -> Tensor:
    """Lower and upper of a page's keys: [..., n, D] -> [..., 2, D].

    They are the elementwise minimum and maximum. With ``std_factor`` they are ``mean - std_factor * std`` and
    ``mean + std_factor * std``, the standard deviation being that of n keys, divided by n. These are float32 and
    specified to the bit: sums in the order of the keys, of their differences to the first key.
    """
    if std_factor is None:
        return torch.stack([keys.amin(-2), keys.amax(-2)], -2)
    each = keys.float().unbind(-2)
    first, count = each[0], len(each)
    total, squares = torch.zeros_like(first), torch.zeros_like(first)
    for key in each:
        difference = key - first
        total, squares = total + difference, squares + difference * difference
    mean = first + total / count
    variance = (squares - total * total / count) / count
    # Float64, since torch's float32 square root is not always the nearest number.
    width = torch.tensor(std_factor, dtype=torch.float32) * variance.clamp(min=0).double().sqrt().float()
    return torch.stack([mean - width, mean + width], -2)


def quantize(bounds: Tensor, bits: int = 8, outward: bool = True) -> tuple[Tensor, Tensor]:
    """Bounds [..., 2, D] as whole numbers, int8 [..., 2, D], times a float32 scale [...].

    The scale is the smallest float32 that is at least ``largest magnitude / 127``, or ``/ 7`` for 4 bits. So no number
    exceeds 127 or 7. Where keys are not finite, or all zero, the numbers are 0 and the scale is NaN, infinite or 0.

    Outward, a lower bound is the largest multiple of the scale that is not above the exact one, and an upper bound the
    smallest that is not below. ``lower * scale <= minimum`` and ``upper * scale >= maximum`` then hold exactly. Else
    the float32 quotient is rounded to the nearest, ties to even.

    Float64 holds the product of a whole number up to 128 and a float32 exactly, so comparing products decides each
    rounding. A quotient is rounded to nearest, so its floor or ceiling is at most one off.
    """
    most = 2 ** (bits - 1) - 1
    exact = bounds.double()
    largest = exact.abs().amax((-2, -1))
    scale = (largest / most).float()
    scale = torch.where(scale.double() * most < largest, scale.nextafter(scale.new_tensor(math.inf)), scale)
    step = scale.double()[..., None]
    some = (step > 0) & step.isfinite()
    if not outward:
        return (bounds.float() / scale[..., None, None]).round().where(some[..., None], 0).to(torch.int8), scale
    lower, upper = exact.unbind(-2)
    below, above = (lower / step).floor(), (upper / step).ceil()
    below = torch.where(below * step > lower, below - 1, below)
    above = torch.where(above * step < upper, above + 1, above)
    whole = torch.stack([below.where(some, 0), above.where(some, 0)], -2)
    return whole.to(torch.int8), scale


def pack(whole: Tensor) -> Tensor:
    """Numbers from -8 to 7, int8 [..., D], as uint8 [..., D / 2]: each plus 8, the even dimension in the low half."""
    even, odd = (whole + 8).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return even | odd << 4


def unpack(packed: Tensor) -> Tensor:
    """The numbers of :func:`pack`."""
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2).to(torch.int8) - 8


def dequantize(k_bounds: Tensor, k_scales: Tensor) -> Tensor:
    """int8 or packed ``k_bounds`` times their scales, exact in float64; NaN where the scale is not finite."""
    if k_bounds.dtype == torch.uint8:
        k_bounds = unpack(k_bounds)
    return k_bounds.double() * k_scales.double()[..., None, None]


def _pages_of_keys(
    k_cache: Tensor, page_table: Tensor, seq_lens: Tensor, first_token: Tensor | None
) -> Iterator[tuple[int, Tensor]]:
    """Each page from that of ``first_token`` to the last: its physical number and its keys [Hkv, n, D]."""
    page_size = k_cache.shape[2]
    for b, length in enumerate(seq_lens.tolist()):
        first_page = 0 if first_token is None else int(first_token[b]) // page_size
        for page in range(first_page, num_pages(length, page_size)):
            physical = int(page_table[b, page])
            yield physical, k_cache[physical, :, : length - page * page_size]


def estimate(
    q: Tensor,
    k_bounds: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    page_size: int,
    k_scales: Tensor | None = None,
    new_lens: Tensor | None = None,
) -> Tensor:
    """The paper's criticality: ``sum_d max(q_d * lower_d, q_d * upper_d)``, an upper bound of q.k over the page.

    The larger product is that with the upper bound where q_d is positive, and with the lower where it is negative. So
    the sum is ``q+ . upper + q- . lower``, where ``q+ = max(q, 0)`` and ``q- = min(q, 0)``.

    Returns:
        scores [B, Hq, P] or [B, T, Hq, P], -inf past the last page.
    """
    if k_scales is not None:
        k_bounds = dequantize(k_bounds, k_scales)
    if q.dim() == 3:
        return estimate(q[:, None], k_bounds, page_table, seq_lens, page_size, None, new_lens)[:, 0]
    B, T, Hq, _ = q.shape
    group = Hq // k_bounds.shape[1]
    scores = torch.full((B, T, Hq, page_table.shape[1]), -math.inf, dtype=torch.float64, device=q.device)
    for b, visible in enumerate(visible_by_token(seq_lens, T, new_lens)):
        for t in range(T):
            n = num_pages(visible[t], page_size)
            bounds = k_bounds[page_table[b, :n].long()].double()  # [n, Hkv, 2, D]
            lower, upper = bounds.repeat_interleave(group, 1).unbind(2)  # [n, Hq, D]
            query = q[b, t].double()
            scores[b, t, :, :n] = ((query.clamp(min=0) * upper).sum(-1) + (query.clamp(max=0) * lower).sum(-1)).T
    return scores


#: The distance of two levels of a code, in standard deviations: that of least squared error for a Gaussian.
CODE_STEP = 0.9957


def hadamard(x: Tensor) -> Tensor:
    """``x`` [..., D] times an orthogonal matrix: Sylvester's, of the largest power of two that divides D, by blocks."""
    D = x.shape[-1]
    block, distance = D & -D, 1
    while distance < block:
        low, high = x.unflatten(-1, (-1, 2, distance)).unbind(-2)
        x = torch.stack([low + high, low - high], -2).flatten(-3)
        distance *= 2
    return x * block**-0.5


def encode_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [..., D] in two bits a dimension: levels -3, -1, 1 or 3, int8 [..., D], and float64 scales [...].

    A rotated key is about its levels times its scale. The scale is that of levels which are :data:`CODE_STEP` standard
    deviations apart, the deviation being the root mean square of the rotated key. Where it is not finite, the levels
    are -3 and the scale is NaN.
    """
    rotated = hadamard(keys.double())
    step = CODE_STEP * rotated.square().mean(-1).sqrt()
    borders = step[..., None]
    levels = 2 * ((rotated > -borders).int() + (rotated > 0).int() + (rotated > borders).int()) - 3
    finite = step.isfinite()
    return levels.where(finite[..., None], -3).to(torch.int8), (step / 2).where(finite, math.nan)


def pack_codes(levels: Tensor) -> Tensor:
    """Levels [..., D] as uint8 [..., D / 4]: (level + 3) / 2 in two bits, the first dimension lowest."""
    codes = ((levels + 3) // 2).to(torch.uint8).unflatten(-1, (-1, 4)).unbind(-1)
    return codes[0] | codes[1] << 2 | codes[2] << 4 | codes[3] << 6


def unpack_codes(k_codes: Tensor) -> Tensor:
    """The levels of :func:`pack_codes`."""
    return torch.stack([k_codes >> 2 * i & 3 for i in range(4)], -1).flatten(-2).to(torch.int8) * 2 - 3


def append_codes(
    k: Tensor,
    k_codes: Tensor,
    code_scales: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    new_lens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Write the codes of k [B, T, Hkv, D] behind ``seq_lens``: new k_codes and code_scales."""
    k_codes, code_scales = k_codes.clone(), code_scales.clone()
    page_size = k_codes.shape[2]
    counts = torch.full_like(seq_lens, k.shape[1]) if new_lens is None else new_lens
    for b, (length, count) in enumerate(zip(seq_lens.tolist(), counts.tolist(), strict=True)):
        levels, scales = encode_keys(k[b])
        for t in range(count):
            page, slot = divmod(length + t, page_size)
            physical = int(page_table[b, page])
            k_codes[physical, :, slot] = pack_codes(levels[t])
            code_scales[physical, :, slot] = scales[t].float()
    return k_codes, code_scales


def rerank_pages(
    q: Tensor,
    k_codes: Tensor,
    code_scales: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    pages: Tensor,
    token_reduce: str = "max",
    scale: float = 1.0,
    new_lens: Tensor | None = None,
) -> Tensor:
    """Scores of the listed pages from the codes of their tokens: float64 [B, Hq, P] or [B, T, Hq, P], -inf elsewhere.

    A token's score is the rotated query times its levels and its scale. A page's is the largest of its tokens' scores
    ("max"), or the log-sum-exp of those times ``scale``, over ``scale`` ("lse").
    """
    if q.dim() == 3:
        args = (k_codes, code_scales, page_table, seq_lens, pages[:, None], token_reduce, scale, new_lens)
        return rerank_pages(q[:, None], *args)[:, 0]
    B, T, Hq, _ = q.shape
    page_size, kv_group, list_group = k_codes.shape[2], Hq // k_codes.shape[1], Hq // pages.shape[2]
    scores = torch.full((B, T, Hq, page_table.shape[1]), -math.inf, dtype=torch.float64, device=q.device)
    rotated = hadamard(q.double())
    for b, by_token in enumerate(visible_by_token(seq_lens, T, new_lens)):
        for t, visible in enumerate(by_token):
            for h in range(Hq):
                for page in pages[b, t, h // list_group].tolist():
                    n = min(page_size, visible - page * page_size)
                    if page < 0 or n <= 0:
                        continue
                    where = int(page_table[b, page]), h // kv_group, slice(n)
                    tokens = unpack_codes(k_codes[where]).double() @ rotated[b, t, h] * code_scales[where].double()
                    best = tokens.max() if token_reduce == "max" else (tokens * scale).logsumexp(0) / scale
                    scores[b, t, h, page] = best
    return scores


def reduce_group(scores: Tensor, num_kv_heads: int, how: str, scale: float = 1.0) -> Tensor:
    """One score a page for the heads that share a list: scores [Hq, n] -> [Hs, n].

    Raises:
        ValueError: ``how`` is not none, max, sum or soft.
    """
    if how == "none":
        return scores
    grouped = scores.unflatten(0, (num_kv_heads, -1))
    if how == "max":
        return grouped.amax(1)
    if how == "sum":
        return grouped.sum(1)
    if how == "soft":
        return (grouped * scale).softmax(-1).sum(1)
    raise ValueError(f"group_reduce must be none, max, sum or soft, got {how!r}")


def topk_pages(
    scores: Tensor,
    seq_lens: Tensor,
    page_size: int,
    k: int,
    num_kv_heads: int,
    group_reduce: str = "max",
    sink_pages: int = 0,
    recent_pages: int = 1,
    scale: float = 1.0,
    new_lens: Tensor | None = None,
    budgets: Tensor | None = None,
    dense_below: int = 0,
) -> Tensor:
    """The k best pages for each token and selection head: int32 [B, Hs, K] or [B, T, Hs, K], ascending, -1 at the end.

    The first ``sink_pages`` and the last ``recent_pages`` pages are always among them. Ties go to the lower page, and
    NaN ranks above everything. ``budgets`` [B] replaces k in a sequence, between the forced pages and k. A sequence of
    at most ``dense_below`` tokens selects all its pages, for which K may exceed k.
    """
    if scores.dim() == 3:
        args = (seq_lens, page_size, k, num_kv_heads, group_reduce, sink_pages, recent_pages, scale, new_lens)
        return topk_pages(scores[:, None], *args, budgets, dense_below)[:, 0]
    B, T, Hq, _ = scores.shape
    heads = Hq if group_reduce == "none" else num_kv_heads
    places = max(k, num_pages(dense_below, page_size))
    pages = torch.full((B, T, heads, places), -1, dtype=torch.int32, device=scores.device)
    for b, visible in enumerate(visible_by_token(seq_lens, T, new_lens)):
        most = k if budgets is None else min(k, max(sink_pages + recent_pages, int(budgets[b])))
        if seq_lens[b] <= dense_below:
            most = places
        for t in range(T):
            n = num_pages(visible[t], page_size)
            if n == 0:
                continue
            reduced = reduce_group(scores[b, t, :, :n].double(), num_kv_heads, group_reduce, scale)
            for h, row in enumerate(reduced.tolist()):

                def rank(page: int, row: list[float] = row, n: int = n) -> tuple[bool, bool, float, int]:
                    forced = page < sink_pages or page >= n - recent_pages
                    nan = math.isnan(row[page])
                    return not forced, not nan, 0.0 if nan else -row[page], page

                best = sorted(sorted(range(n), key=rank)[:most])
                pages[b, t, h, : len(best)] = torch.tensor(best, dtype=torch.int32)
    return pages


def sparse_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    page_table: Tensor,
    seq_lens: Tensor,
    pages: Tensor | None = None,
    scale: float | None = None,
    new_lens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the tokens of the selected pages, or of all pages where ``pages`` is None.

    A row whose scores are all -inf is an empty row, like one without tokens: out 0 and lse -inf.

    Returns:
        out like q and lse [B, Hq] or [B, T, Hq], the log-sum-exp of the scaled scores; both float64.
    """
    if q.dim() == 3:
        pages = None if pages is None else pages[:, None]
        out, lse = sparse_decode(q[:, None], k_cache, v_cache, page_table, seq_lens, pages, scale, new_lens)
        return out[:, 0], lse[:, 0]
    B, T, Hq, D = q.shape
    page_size = k_cache.shape[2]
    kv_group = Hq // k_cache.shape[1]
    scale = D**-0.5 if scale is None else scale
    out = torch.zeros((B, T, Hq, D), dtype=torch.float64, device=q.device)
    lse = torch.full((B, T, Hq), -math.inf, dtype=torch.float64, device=q.device)
    for b, by_token in enumerate(visible_by_token(seq_lens, T, new_lens)):
        for t, visible in enumerate(by_token):
            for h in range(Hq):
                if pages is None:
                    chosen = torch.arange(num_pages(visible, page_size), device=q.device)
                else:
                    chosen = pages[b, t, h // (Hq // pages.shape[2])].long()
                    chosen = chosen[(chosen >= 0) & (chosen * page_size < visible)]
                position = (chosen[:, None] * page_size + torch.arange(page_size, device=q.device)).flatten()
                seen = position < visible
                if not bool(seen.any()):
                    continue  # no token
                physical = page_table[b, chosen].long()
                keys = k_cache[physical, h // kv_group].flatten(0, 1)[seen].double()
                values = v_cache[physical, h // kv_group].flatten(0, 1)[seen].double()
                score = keys @ q[b, t, h].double() * scale
                if bool((score == -math.inf).all()):
                    continue  # no token has a weight
                lse[b, t, h] = score.logsumexp(0)
                out[b, t, h] = score.softmax(0) @ values
    return out, lse
