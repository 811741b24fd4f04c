"""The attention mass that a selection keeps of dense attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn.functional import pad

from ..policies.tokens import scores

if TYPE_CHECKING:
    from torch import Tensor


def attention_mass(
    q: Tensor, k: Tensor, scale: float, pages: Tensor | None, tokens: Tensor | None, page_size: int
) -> Tensor:
    """The share of each head's dense softmax that falls on the selection, float32 [B, Hq].

    Args:
        q: [B, Hq, D].
        k: [B, Hkv, length, D].
        scale: of the scores before the softmax.
        pages: int32 [B, Hs, K], logical pages, -1 where there is none; or None.
        tokens: int64 [B, Hs, n]; or None. With neither, everything is selected.
        page_size: S.
    """
    weights = scores(q, k, scale).softmax(-1)
    if pages is None and tokens is None:
        return weights.sum(-1)
    if tokens is None:
        assert pages is not None
        missing = -weights.shape[-1] % page_size
        weights = pad(weights, (0, missing)).unflatten(-1, (-1, page_size)).sum(-1)
        chosen, real = pages.long().clamp(min=0), pages >= 0
    else:
        chosen, real = tokens, tokens >= 0
    group = weights.shape[1] // chosen.shape[1]
    chosen, real = (x.repeat_interleave(group, 1) for x in (chosen, real))
    return weights.gather(-1, chosen).where(real, 0).sum(-1)
