"""Dense attention of one token by the fastest kernels at hand, timed with the write of the new token."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from layers import Layer, append, attend
from timing import Timing, time_calls
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from workloads import Workload


def contiguous(w: Workload, x: Layer) -> tuple[Tensor, Tensor]:
    """The step's keys and values in the layout of dense kernels, [B, Hkv, L, D]."""
    k, v = (
        cache[x.page_table.long()].transpose(1, 2).reshape(w.batch, w.kv_heads, w.context, w.head_dim)
        for cache in (x.k_cache, x.v_cache)
    )
    return k[:, :, : w.context - 3], v[:, :, : w.context - 3]


def peers(w: Workload) -> Iterator[tuple[str, Callable[[Tensor, Tensor, Tensor], Tensor]]]:
    """The peers that are installed: (q [B, Hq, 1, D], k, v) -> out."""
    gqa = w.heads != w.kv_heads
    for name, backend in (("cuDNN", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):

        def sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, enable_gqa=gqa)

        yield name, sdpa
    with contextlib.suppress(ImportError):
        from torch.nn.attention.flex_attention import flex_attention

        compiled = torch.compile(flex_attention, dynamic=False)
        yield "FlexAttention", lambda q, k, v: compiled(q, k, v, enable_gqa=gqa)
    with contextlib.suppress(ImportError):
        import flashinfer

        def single(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return flashinfer.single_decode_with_kv_cache(q[0, :, 0], k[0], v[0], kv_layout="HND")[None, :, None]

        if w.batch == 1:
            yield "FlashInfer", single


def time_peers(w: Workload, layers: list[Layer], with_flex: bool) -> dict[str, Timing]:
    caches, times = [contiguous(w, x) for x in layers], {}
    for name, run in peers(w):
        if name == "FlexAttention" and not with_flex:
            continue

        def step(x: Layer, kv: tuple[Tensor, Tensor], run: Callable[..., Tensor] = run) -> Tensor:
            for cache, new in zip(kv, (x.k_new, x.v_new), strict=True):
                cache[:, :, -1].copy_(new[:, 0])
            return run(x.q[:, :, None], *kv)

        try:
            out = step(layers[0], caches[0])[:, :, 0]
            append(layers[0])
            off = ((out - attend(layers[0], None)).float().norm() / out.float().norm()).item()
            assert off < 2e-2, f"{w}: {name} and the dense mode differ by {off:.2g}"
            times[name] = time_calls([lambda x=x, kv=kv: step(x, kv) for x, kv in zip(layers, caches, strict=True)])
        except RuntimeError as error:  # a backend that does not take this shape
            print(f"{w}: {name} does not run: {str(error).splitlines()[0][:100]}")
    return times
