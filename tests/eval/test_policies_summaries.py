"""Page summaries and the second stage: against their definitions, against the operators, and their bytes."""

import math

import pytest
import torch
from helpers.policy_layers import CONTEXT, HKV, SCALE, D, S, make_layer, query
from quest_eval.policies import KVShape, key_codes, make, summaries
from quest_ops import reference

KINDS = ("minmax", "mean_std", "mean_var")


def keys(seed=0, n=S):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, 5, n, D, generator=random) + 2 * torch.randn(D, generator=random)


def exact(x, kind, factor):
    x = x.double()
    if kind == "minmax":
        centre, width = (x.amin(-2) + x.amax(-2)) / 2, (x.amax(-2) - x.amin(-2)) / 2
    else:
        centre, width = x.mean(-2), x.std(-2, correction=0)
    return centre, factor * width


# One stage


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [0.3, 1.0])
@pytest.mark.parametrize("n", [1, 7, S])
def test_scores_are_those_of_the_definition(kind, factor, n):
    x, q = keys(n=n), torch.randn(2, 6, D, generator=torch.Generator().manual_seed(1))
    centre, width = exact(x, kind, factor)
    found = summaries.score(q, summaries.summarise(x, kind, factor, None), kind)
    heads = q.double().unflatten(1, (3, 2))
    spread = heads.abs() @ width.transpose(-1, -2)
    if kind == "mean_var":
        spread = (heads.square() @ width.square().transpose(-1, -2)).sqrt()
    wanted = (heads @ centre.transpose(-1, -2) + spread).flatten(1, 2)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


def test_minimum_and_maximum_of_8_bits_are_the_operators():
    x = keys()
    lower, upper = x.amin(-2), x.amax(-2)
    numbers, scale = reference.quantize(torch.stack([lower, upper], -2))
    wanted = numbers.double() * scale.double()[..., None, None]
    found = summaries.summarise(x, "minmax", 1.0, 8).double()
    # A quotient that is whole to float32 may be one step off.
    assert ((found - wanted).abs() > 1e-5).double().mean() < 1e-3
    assert (found - wanted).abs().max() <= 1.001 * scale.max()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_rounding_is_by_less_than_a_step(kind, bits):
    x = keys()
    fine, coarse = (summaries.summarise(x, kind, 1.0, width) for width in (None, bits))
    step = fine.abs().amax((-2, -1), keepdim=True) / (2 ** (bits - 1) - 1)
    assert ((fine - coarse).abs() <= 1.001 * step * (1 if kind == "minmax" else 0.5)).all()
    assert len((coarse[0, 0, 0] / step[0, 0, 0]).round().unique()) <= 2**bits
    if kind == "minmax":
        lower, upper = coarse.unbind(-2)
        assert (lower <= fine[..., 0, :] + 1e-5).all() and (upper >= fine[..., 1, :] - 1e-5).all()


def test_what_is_all_zero_stays_zero():
    assert not summaries.summarise(torch.zeros(1, 4, D), "mean_std", 1.0, 4).any()


@pytest.mark.parametrize(
    ("emulated", "operators"),
    [
        ("summary,summary=minmax,bits=none,sink_pages=0", "quest"),
        ("summary,summary=minmax,bits=8,sink_pages=2", "quest-int8,sink_pages=2"),
        ("summary,summary=minmax,bits=none,sink_pages=0,group_reduce=none", "quest-head"),
        ("summary,bits=none,sink_pages=1,recent_pages=2", "quest-meanstd,sink_pages=1,recent_pages=2"),
    ],
)
def test_the_emulation_selects_as_the_operators(device, emulated, operators):
    mine, theirs = (make_layer(device) for _ in range(2))
    readers = [make(name, 5 * S).start(kv) for name, kv in ((emulated, mine), (operators, theirs))]
    for step in range(12):  # over the edge of a page, at 160
        for kv in (mine, theirs):
            kv.length.set(CONTEXT + 1 + step)
        outs = [reader.attend(query(device, step)) for reader in readers]
        assert torch.equal(readers[0].pages, readers[1].pages)
        assert torch.equal(*outs)


@pytest.mark.parametrize("name", ["summary", "two-stage", "summary,summary=mean_var,bits=4"])
def test_memory_behind_the_sequence_is_not_read(device, name):
    outs = []
    for rest in (0.0, math.nan):
        kv = make_layer(device)
        kv.k[:, :, CONTEXT:] = rest
        reader = make(name, 4 * S).start(kv)
        for step in range(12):
            kv.length.set(CONTEXT + 1 + step)
            kv.k[:, :, CONTEXT + step] = query(device, 50 + step)[:, :HKV]
            outs.append(reader.attend(query(device, step)))
    assert all(torch.equal(a, b) for a, b in zip(outs[:12], outs[12:], strict=True))


# Codes of keys


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_the_rotation_is_orthogonal(head_dim):
    rotation = key_codes.hadamard(head_dim)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(head_dim), rtol=0, atol=1e-5)
    assert len(rotation.abs().unique()) <= 2


def test_levels_are_those_of_max():
    """Max, "Quantizing for Minimum Distortion", 1960, Table I."""
    wanted = {1: [0.7980], 2: [0.4528, 1.510], 3: [0.2451, 0.7560, 1.344, 2.152]}
    wanted[4] = [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733]
    for bits, positive in wanted.items():
        levels = key_codes.lloyd_max(bits)
        assert levels[len(positive) :] == pytest.approx(positive, rel=1e-3)
        assert levels[: len(positive)] == pytest.approx([-level for level in reversed(positive)], rel=1e-3)


@pytest.mark.parametrize(("bits", "error"), [(1, 0.3634), (2, 0.1175), (3, 0.03454), (4, 0.009497)])
def test_codes_have_the_error_of_the_theory(device, bits, error):
    """The mean squared errors of the same table, of Gaussian keys."""
    random = torch.Generator().manual_seed(0)
    k = torch.randn(1, 2, 2048, 64, generator=random).to(device)
    codes = key_codes.KeyCodes(k, 2000, bits)
    for tokens in range(2001, 2049):
        codes.append(tokens)
    # A unit query a dimension gives the decoded keys back.
    decoded = torch.stack([codes.scores(row.expand(1, 2, -1), 2048) for row in torch.eye(64, device=device)], -1)
    assert float((decoded - k).square().mean()) == pytest.approx(error, rel=0.05)


# Two stages


def pages_of(kv, name, budget=4 * S, seed=0):
    kv.length.set(CONTEXT + 1)
    reader = make(name, budget).start(kv)
    reader.attend(query(kv.k.device, seed))
    return reader


def test_the_second_stage_chooses_among_what_the_first_keeps(device):
    kv = make_layer(device)
    for seed in range(8):
        kept = pages_of(kv, "summary", 5 * S, seed).pages
        chosen = pages_of(kv, "two-stage,keep=0.5", 3 * S, seed).pages
        assert kept.shape[-1] == 5 and chosen.shape[-1] == 3
        assert all(
            set(a) <= set(b) for a, b in zip(chosen.flatten(0, 1).tolist(), kept.flatten(0, 1).tolist(), strict=True)
        )


def test_with_all_pages_kept_the_second_stage_alone_decides(device):
    kv = make_layer(device)
    for rerank in ("max", "lse"):
        for seed in range(4):
            reader = pages_of(
                kv, f"two-stage,keep=1,code_bits=4,group_reduce=none,sink_pages=0,rerank={rerank}", 4 * S, seed
            )
            estimates = reader._codes.scores(query(device, seed), CONTEXT + 1).cpu() * SCALE
            missing = -(CONTEXT + 1) % S
            pages = torch.nn.functional.pad(estimates, (0, missing), value=-math.inf).unflatten(-1, (-1, S))
            scores = pages.amax(-1) if rerank == "max" else pages.exp().sum(-1).log()
            scores[..., -1] = math.inf
            wanted = scores.topk(4).indices.sort(-1).values
            assert torch.equal(reader.pages.cpu().long(), wanted)


def test_more_bits_choose_more_of_the_best_pages(device):
    kv, shared = make_layer(device), []
    for bits in range(1, 5):
        shared.append(0)
        for seed in range(8):
            best = pages_of(kv, "page-oracle,sink_pages=1", 4 * S, seed).pages.flatten(0, 1).tolist()
            name = f"two-stage,keep=1,code_bits={bits},group_reduce=none"
            found = pages_of(kv, name, 4 * S, seed).pages.flatten(0, 1).tolist()
            shared[-1] += sum(len(set(a) & set(b)) for a, b in zip(found, best, strict=True))
    assert shared == sorted(set(shared))


# Bytes


@pytest.mark.parametrize(
    ("name", "a_token"),
    [
        ("summary", 8.25),
        ("summary,bits=4", 4.25),
        ("summary,bits=none", 16),
        ("summary,page_size=8", 16.5),
        ("two-stage", 12.75),
        ("two-stage,keep=0.125", 10.5),
        ("two-stage,keep=0.125,code_bits=4", 8.25 + 34 / 8),
    ],
)
def test_bytes_a_token_and_kv_head(name, a_token):
    """Those of 16-bit caches with head_dim 64, beside the keys and values that are attended to."""
    shape, length = KVShape(9, 3, 64, 2), 8192
    policy = make(name, 256)
    attended = policy.tokens_attended(0, length) * shape.token_bytes
    assert (policy.bytes_read(shape, 0, length) - attended) / (length * 3) == a_token
    codes = 0 if policy.code_bits is None else 8 * policy.code_bits + 2
    held = (policy.bytes_held(shape, 0, length) - length * shape.token_bytes) / (length * 3)
    assert held == policy.page_bytes(shape) / 3 / policy.page_size + codes


# Bad input


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("summary,bits=3", "bits must be 8, 4 or none"),
        ("summary,factor=-1", "factor must be at least 0, got -1.0"),
        ("two-stage,keep=0", "keep must be above 0 and at most 1, got 0.0"),
        ("two-stage,code_bits=5", "code_bits must be from 1 to 4 or none"),
        ("summary,summary=median", "summary in .* must be one of minmax, mean_std, mean_var, got 'median'"),
    ],
)
def test_what_there_is_not_is_an_error(name, message):
    with pytest.raises(ValueError, match=message):
        make(name, 64)
