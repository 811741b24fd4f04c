"""Quest's variants and its emulation against the reference, and the parts that policies share."""

import math

import pytest
import torch
from helpers.policy_layers import CONTEXT, HKV, HQ, SCALE, B, D, S, make_layer, query
from quest_eval.decoding.attention_mass import attention_mass
from quest_eval.policies import NAMES, column_sums, emulation, make
from quest_ops import reference


def paged(kv):
    """The cache as the reference takes it, on the CPU: k, v, page table, lengths."""
    count = kv.k.shape[2] // S
    k, v = (x.cpu().unflatten(2, (count, S)).transpose(1, 2).flatten(0, 1) for x in (kv.k, kv.v))
    return k, v, torch.arange(B * count, dtype=torch.int32).view(B, count), kv.length.seq_lens.cpu()


def reference_step(kv, q, name, num_pages, recent_pages=1):
    k, v, table, lens = paged(kv)
    q, bounds = q.cpu(), torch.zeros(len(k), HKV, 2, D, dtype=torch.float64)
    factor = 1.0 if name == "quest-meanstd" else None
    bounds = reference.update_bounds(k, bounds.to(k.dtype), table, lens, std_factor=factor)
    if name == "quest-shared":
        scores = reference.estimate(q.double().unflatten(1, (HKV, -1)).mean(2), bounds, table, lens, S)
        pages = reference.topk_pages(scores, lens, S, num_pages, 1, "sum").expand(-1, HKV, -1)
    else:
        how = {"quest-head": "none", "quest-sum": "sum", "quest-soft": "soft"}.get(name, "max")
        scores = reference.estimate(q, bounds, table, lens, S)
        pages = reference.topk_pages(scores, lens, S, num_pages, HKV, how, recent_pages=recent_pages, scale=SCALE)
    return pages, reference.sparse_decode(q, k, v, table, lens, pages, SCALE)[0]


VARIANTS = [name for name in NAMES if name.startswith("quest") and name not in ("quest-int8", "quest-default")]


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_are_what_the_reference_makes_of_them(device, name):
    kv = make_layer(device)
    reader = make(name, 4 * S).start(kv)
    for step in range(12):  # over the edge of a page, at 160
        kv.length.set(CONTEXT + 1 + step)
        q = query(device, step)
        out = reader.attend(q)
        pages, wanted = reference_step(kv, q, name, 4)
        assert torch.equal(reader.pages.cpu(), pages)
        torch.testing.assert_close(out.cpu().double(), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recent", [0, 1, 2])
@pytest.mark.parametrize("every", [1, 3, 20])
def test_a_selection_is_kept_for_some_steps(device, every, recent):
    kv = make_layer(device)
    reader = make(f"quest,reselect_every={every},recent_pages={recent}", 4 * S).start(kv)
    for step in range(24):  # over the edges of pages at 160 and 176
        kv.length.set(CONTEXT + 1 + step)
        q = query(device, step)
        out = reader.attend(q)
        if step == 0 or (kv.length.tokens - 1) % S % every == 0:
            pages = reference_step(kv, q, "quest", 4, recent)[0]
        count = -(-kv.length.tokens // S)
        pages[:, :, 4 - recent :] = torch.arange(count - recent, count)
        assert torch.equal(reader.pages.cpu(), pages)
        k, v, table, lens = paged(kv)
        wanted = reference.sparse_decode(q.cpu(), k, v, table, lens, pages, SCALE)[0]
        torch.testing.assert_close(out.cpu().double(), wanted, rtol=1e-4, atol=1e-4)


def test_a_short_sequence_is_read_whole_in_each_step(device):
    """The page that is one too many lets it select."""
    kv = make_layer(device)
    reader = make("quest,reselect_every=30", 11 * S).start(kv)
    for step in range(30):  # 10 pages to 160, 11 to 176, 12 from there on
        kv.length.set(CONTEXT + 1 + step)
        q = query(device, step)
        reader.attend(q)
        if kv.length.tokens <= 11 * S + 1:
            pages = reference_step(kv, q, "quest", 11)[0]
        assert torch.equal(reader.pages.cpu(), pages)


def test_the_first_step_that_is_not_dense_selects(device):
    kv = make_layer(device)
    reader = make(f"quest,reselect_every=50,dense_below={CONTEXT + 5}", 4 * S).start(kv)
    for step in range(5):
        kv.length.set(CONTEXT + 1 + step)
        reader.attend(query(device, step))
        assert reader.pages is None
    kv.length.set(CONTEXT + 6)
    reader.attend(query(device))
    assert torch.equal(reader.pages.cpu(), reference_step(kv, query(device), "quest", 4)[0])


def test_candidates_are_selected_among_by_the_codes_of_their_keys(device):
    kv = make_layer(device)
    policy = make(f"quest,candidates={8 * S}", 4 * S)
    reader = policy.start(kv)
    for step in range(12):
        kv.length.set(CONTEXT + 1 + step)
        q = query(device, step)
        out = reader.attend(q)
        k, v, table, lens = paged(kv)
        candidates = reference_step(kv, q, "quest", 8)[0]
        codes = torch.zeros(len(k), HKV, S, D // 4, dtype=torch.uint8), torch.zeros(len(k), HKV, S)
        keys = kv.k.cpu().transpose(1, 2)[:, : kv.length.tokens]
        codes = reference.append_codes(keys, *codes, table, torch.zeros_like(lens))
        scores = reference.rerank_pages(q.cpu(), *codes, table, lens, candidates)
        pages = reference.topk_pages(scores, lens, S, 4, HKV)
        assert torch.equal(reader.pages.cpu(), pages)
        wanted = reference.sparse_decode(q.cpu(), k, v, table, lens, pages, SCALE)[0]
        torch.testing.assert_close(out.cpu().double(), wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="candidates must be 0 with shared, got 128"):
        make("quest-shared,candidates=128", 4 * S)


def test_variants_choose_differently():
    chosen = set()
    for name in ("quest-head", "quest", "quest-sum", "quest-soft", "quest-shared", "quest-meanstd"):
        kv = make_layer("cpu")
        reader = make(name, 4 * S).start(kv)
        kv.length.set(CONTEXT + 1)
        reader.attend(query("cpu"))
        rows = reader.pages.repeat_interleave(HQ // reader.pages.shape[1], 1)
        chosen.add(tuple(rows.flatten().tolist()))
    assert len(chosen) == 6


def test_int8_bounds_choose_nearly_the_same(device):
    kv = make_layer(device)
    lists = []
    for name in ("quest", "quest-int8"):
        reader = make(name, 4 * S).start(kv)
        kv.length.set(CONTEXT + 1)
        reader.attend(query(device))
        lists.append(reader.pages.flatten(0, 1).tolist())
        kv.length.set(CONTEXT)
    shared = [len(set(a) & set(b)) for a, b in zip(*lists, strict=True)]
    assert sum(shared) >= 0.75 * 4 * len(shared)


# The emulation


@pytest.mark.parametrize("how", ["none", "max", "sum", "soft"])
def test_the_emulation_is_the_reference(device, how):
    kv = make_layer(device)
    policy = emulation.QuestEmulation("emulation", 4 * S, group_reduce=how)
    reader = policy.start(kv)
    name = {"none": "quest-head", "max": "quest"}.get(how, f"quest-{how}")
    for step in range(12):
        kv.length.set(CONTEXT + 1 + step)
        q = query(device, step)
        out = reader.attend(q)
        pages, wanted = reference_step(kv, q, name, 4)
        assert torch.equal(reader.pages.cpu(), pages.long())
        torch.testing.assert_close(out.cpu().double(), wanted, rtol=1e-6, atol=1e-6)


def test_ties_go_to_the_lower_page():
    scores = torch.tensor([[[1.0, 3.0, 3.0, 3.0, 0.0]]])
    assert emulation.select(scores, 3).tolist() == [[[1, 2, 4]]]
    assert emulation.select(scores, 9).tolist() == [[[0, 1, 2, 3, 4]]]


# What policies share


@pytest.mark.parametrize("elements", [1, 5000, 2**26])
@pytest.mark.parametrize("queries", [1, 40, 100])
def test_column_sums_are_those_of_whole_attention(device, elements, queries, monkeypatch):
    monkeypatch.setattr(column_sums, "_ELEMENTS", elements)
    random = torch.Generator().manual_seed(0)
    q, k = torch.randn(B, HQ, queries, D, generator=random), torch.randn(B, HKV, 100, D, generator=random)
    sums = torch.ones(B, HKV, 120, device=device)
    column_sums.add_column_sums(sums, q.to(device), k.to(device), SCALE)
    scores = q.double() @ k.double().repeat_interleave(HQ // HKV, 1).transpose(-1, -2) * SCALE
    visible = torch.ones(queries, 100, dtype=torch.bool).tril(100 - queries)
    weights = scores.masked_fill(~visible, -math.inf).softmax(-1)
    wanted = torch.nn.functional.pad(weights.sum(2).unflatten(1, (HKV, -1)).sum(2), (0, 20)) + 1
    torch.testing.assert_close(sums.cpu().double(), wanted, rtol=1e-5, atol=1e-5)


def test_recall_is_the_attention_on_what_was_selected(device):
    kv = make_layer(device)
    length, q = 155, query(device)
    k = kv.k[:, :, :length]
    scores = q.cpu().double()[:, :, None] @ k.cpu().double().repeat_interleave(HQ // HKV, 1).transpose(-1, -2) * SCALE
    weights = scores[:, :, 0].softmax(-1)
    pages = torch.tensor([[3, 9, -1], [0, 1, 2]], dtype=torch.int32).expand(B, HKV, 3).clone()
    pages[:, 1] = pages[:, 0]
    pages[1, 1] = torch.tensor([0, 1, 2])
    mass = attention_mass(q, k, SCALE, pages.to(device), None, S).cpu().double()
    torch.testing.assert_close(mass[0, 0], weights[0, 0, 48:64].sum() + weights[0, 0, 144:155].sum())
    torch.testing.assert_close(mass[1, HQ - 1], weights[1, HQ - 1, :48].sum())
    tokens = torch.tensor([0, 7, 154]).expand(B, 1, 3)
    mass = attention_mass(q, k, SCALE, None, tokens.to(device), S).cpu().double()
    torch.testing.assert_close(mass, weights[:, :, [0, 7, 154]].sum(-1))
    assert attention_mass(q, k, SCALE, None, None, S).cpu() == pytest.approx(torch.ones(B, HQ))
