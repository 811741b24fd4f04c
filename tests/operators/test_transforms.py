"""Unsupported transforms raise a one-sentence error: derivatives, torch.func, vmap over a cache, autocast."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers.operator_cases import Case, Shape
from quest_ops import PagedKVCache, QuestConfig, ops, quest_attention
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.functional import linear

CONFIG = QuestConfig(32, 16, dense_layers=0)


def scoring(x: Case) -> Callable[[Tensor], Tensor]:
    return lambda q: ops.estimate(q, x.k_bounds, x.page_table, x.seq_lens, 16)


def attention(x: Case) -> Callable[[Tensor], Tensor]:
    return lambda q: ops.sparse_decode(q, x.k_cache, x.v_cache, x.page_table, x.seq_lens)[0]


def whole_step(x: Case) -> Callable[[Tensor], Tensor]:
    caches = (x.k_cache, x.v_cache, x.k_bounds)
    k = torch.ones(2, 1, 2, 64, device=x.q.device)
    return lambda q: ops.decode_step(q, k, k, *caches, x.page_table, x.seq_lens - 1, x.seq_lens, 2)[0]


NAMED = {"estimate": scoring, "sparse_decode": attention, "decode_step": whole_step}
DIFFERENTIABLE = pytest.mark.parametrize(("name", "make"), NAMED.items(), ids=NAMED)


@DIFFERENTIABLE
def test_derivatives_are_refused(device: str, name: str, make: Callable[[Case], Callable[[Tensor], Tensor]]) -> None:
    x = Case(Shape(lengths=(40, 33), spare_pages=0)).on(device)
    op, q = make(x), x.q.clone()
    total = lambda q: op(q)[..., :3].sum()  # noqa: E731
    with pytest.raises(RuntimeError, match=rf"quest::{name} has no backward: .* torch.no_grad\(\)"):
        total(q.requires_grad_()).backward()
    with torch.no_grad():
        assert not op(q).requires_grad
    q = q.detach()
    for derivative in (torch.func.grad, torch.func.jacrev, torch.func.hessian):
        with pytest.raises(RuntimeError, match=f"quest::{name} has no"):
            derivative(total)(q)
    with pytest.raises(RuntimeError, match=f"quest::{name} has no forward-mode derivative"):
        torch.func.jvp(op, (q,), (q,))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=f"quest::{name} has no forward-mode derivative"):
        op(forward_ad.make_dual(q, q))
    with forward_ad.dual_level():
        torch.testing.assert_close(op(q), op(q.clone()))  # nothing to differentiate


@DIFFERENTIABLE
def test_a_compiled_derivative_is_refused(
    device: str, name: str, make: Callable[[Case], Callable[[Tensor], Tensor]]
) -> None:
    torch._dynamo.reset()
    x = Case(Shape()).on(device)
    compiled = torch.compile(make(x), fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match=f"quest::{name} has no backward"):
        compiled(x.q.clone().requires_grad_()).sum().backward()


def attend(device: str, prior: int, new: int, wanting: str, compiled: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    """An attention step of ``new`` tokens after ``prior`` ones; the inputs named in ``wanting`` require a gradient."""
    cache = PagedKVCache(1, 2, 64, max_tokens=128, dtype=torch.float32, device=device)
    sizes = {"q": 4, "k": 2, "v": 2}
    if prior:
        cache.advance(prior)
        quest_attention(*(torch.randn(1, prior, h, 64, device=device) for h in sizes.values()), cache, 0, CONFIG)
    cache.advance(new)
    inputs = {name: torch.randn(1, new, h, 64, device=device) for name, h in sizes.items()}
    for name in wanting:
        inputs[name].requires_grad_()
    run = torch.compile(quest_attention, fullgraph=True, backend="aot_eager") if compiled else quest_attention
    return run(*inputs.values(), cache, 0, CONFIG), inputs


@pytest.mark.parametrize("wanting", ["q", "k", "v"])
@pytest.mark.parametrize("new", [1, 20], ids=["decode", "later_prefill"])
def test_attention_over_a_cache_has_no_backward(device: str, new: int, wanting: str) -> None:
    out, _ = attend(device, 40, new, wanting)
    with pytest.raises(RuntimeError, match="quest_attention over a cache has no backward: quest_ops is for decoding"):
        out.sum().backward()


@pytest.mark.parametrize("new", [1, 20], ids=["decode", "later_prefill"])
def test_compiled_attention_over_a_cache_has_no_backward(device: str, new: int) -> None:
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="quest_attention over a cache has no backward"):
        attend(device, 40, new, "v", compiled=True)[0].sum().backward()


def test_a_first_prefill_is_torchs_attention_and_has_its_gradients(device: str) -> None:
    out, inputs = attend(device, 0, 20, "qkv")
    gradients = torch.autograd.grad(out.square().sum(), list(inputs.values()))
    q, k, v = (x.transpose(1, 2) for x in inputs.values())
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    expected = torch.autograd.grad(plain.square().sum(), list(inputs.values()))
    # On a GPU, grouped heads run another of torch's kernels than here, with other rounding.
    tolerance = {} if device == "cpu" else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(gradients, expected, **tolerance)


def test_a_cache_stores_values_alone(device: str) -> None:
    x = Case(Shape()).on(device)
    k = torch.randn(2, 1, 2, 64, device=device, requires_grad=True)
    ops.append_kv(k, k, x.k_cache, x.v_cache, x.k_bounds, x.page_table, x.seq_lens - 1)
    assert not (x.k_cache.requires_grad or x.v_cache.requires_grad or x.k_bounds.requires_grad)


def test_vmap_loops_over_what_it_can(device: str) -> None:
    x = Case(Shape()).on(device)
    q = torch.stack([x.q, -x.q, x.q * 2])
    for op in (scoring(x), attention(x)):
        torch.testing.assert_close(torch.vmap(op)(q), torch.stack([op(row) for row in q]), rtol=0, atol=0)
    scores = scoring(x)(x.q)
    pages = lambda scores: ops.topk_pages(scores, x.seq_lens, 16, 2, 2)  # noqa: E731
    both = torch.stack([scores, -scores])
    torch.testing.assert_close(torch.vmap(pages)(both), torch.stack([pages(row) for row in both]), rtol=0, atol=0)


def test_vmap_refuses_what_writes(device: str) -> None:
    x = Case(Shape()).on(device)
    k, before = torch.randn(3, 2, 1, 2, 64, device=device), x.k_cache.clone()
    rest = (x.k_cache, x.v_cache, x.k_bounds, x.page_table, x.seq_lens - 1)
    with pytest.raises(RuntimeError, match="append_kv"):
        torch.vmap(lambda k: ops.append_kv(k, k, *rest))(k)
    lens = torch.stack([x.seq_lens] * 2)
    with pytest.raises(RuntimeError, match="update_bounds"):
        torch.vmap(lambda lens: ops.update_bounds(x.k_cache, x.k_bounds, x.page_table, lens))(lens)
    with pytest.raises(RuntimeError, match="decode_step"):
        torch.vmap(whole_step(x))(torch.stack([x.q] * 2))
    torch.testing.assert_close(x.k_cache, before, rtol=0, atol=0, equal_nan=True)


def test_functional_call(device: str) -> None:
    """torch.func.functional_call swaps parameters only, so a step can run with others."""

    class Attention(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(64, 64, device=device) / 8)

        def forward(self, x: Tensor, cache: PagedKVCache) -> Tensor:
            cache.advance(1)
            q = k = v = linear(x, self.weight)
            return quest_attention(q, k, v, cache, 0, CONFIG)

    def run(call: Callable[[PagedKVCache], Tensor]) -> Tensor:
        cache = PagedKVCache(1, 2, 64, max_tokens=64, dtype=torch.float32, device=device)
        with torch.no_grad():
            return torch.stack([call(cache) for _ in range(3)])

    module, other, x = Attention(), Attention(), torch.randn(1, 1, 2, 64, device=device)
    swapped = run(lambda cache: torch.func.functional_call(module, dict(other.named_parameters()), (x, cache)))
    torch.testing.assert_close(swapped, run(lambda cache: other(x, cache)), rtol=0, atol=0)


@pytest.mark.parametrize("new", [1, 20], ids=["decode", "prefill"])
def test_autocast_hands_over_its_dtype(device: str, new: int) -> None:
    weight, x = torch.randn(64, 64, device=device), torch.randn(1, new, 2, 64, device=device)
    cache = PagedKVCache(1, 2, 64, max_tokens=64, dtype=torch.bfloat16, device=device)
    wrong = PagedKVCache(1, 2, 64, max_tokens=64, dtype=torch.float32, device=device)
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        q = k = v = linear(x, weight)
        cache.advance(new)
        assert quest_attention(q, k, v, cache, 0, CONFIG).dtype == torch.bfloat16
        wrong.advance(new)
        with pytest.raises(
            ValueError, match=r"q must be torch.float32 .* got torch.bfloat16 .*: convert it, or make the cache"
        ):
            quest_attention(q, k, v, wrong, 0, CONFIG)
        with pytest.raises(RuntimeError, match="k must be float32|k_cache must be|must be .* like"):
            ops.append_kv(k, v, *wrong.layer(0)[:3], wrong.page_table, wrong.start_lens)
