"""The baselines against cases worked out by hand: which tokens each attends to, step by step, and what comes out.

Most layers here have keys of one number, the logarithm of a weight: with a query of 1 a token's softmax weight is its
weight's share, with a query of 0 all are equal. Values are the tokens' positions.
"""

import math

import pytest
import torch
from quest_eval.policies import NAMES, KVShape, LayerKV, Length, make
from quest_eval.policies.sparq import SparQ


def layer(keys, values=None, *, context, device, scale=1.0, capacity=None, **noted):
    """A layer of one sequence that holds keys [Hkv, L, D], of which the first ``context`` tokens are the context."""
    keys = torch.as_tensor(keys, dtype=torch.float32, device=device)[None]
    if values is None:
        values = torch.arange(keys.shape[2], device=device).float()[:, None].expand(keys.shape)
    length = Length(1, context, torch.device(device))
    last = noted.pop("last_queries", torch.zeros(1, keys.shape[1], 1, keys.shape[3]))
    noted = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in noted.items()}
    return LayerKV(keys.contiguous(), values.contiguous(), length, context, scale, last.to(device), **noted)


def weighted(weights):
    """Keys [1, L, 1] whose softmax weights under a query of 1 are in proportion to these."""
    return torch.tensor(weights, dtype=torch.float64).log()[None, :, None]


def step(reader, *queries):
    """Decode the next token with a query for each head: what the step attended to, and its output's first numbers."""
    reader.kv.length.set(reader.kv.length.tokens + 1)
    q = torch.as_tensor(queries, dtype=torch.float32, device=reader.kv.k.device).view(1, len(queries), -1)
    out = reader.attend(q)
    assert out.shape == q.shape
    attended = None if reader.tokens is None else [sorted(row) for row in reader.tokens[0].tolist()]
    return attended, out[0, :, 0].tolist()


def test_h2o_keeps_the_heavy_and_the_latest(device):
    # Two heavy hitters and two recent tokens, of which the one being decoded is the second.
    sums = torch.tensor([[[5.0, 0.1, 0.7, 0.2, 0.6]]])
    kv = layer(weighted([1, 1, 1, 1, 1, 13, 1, 1]), context=5, device=device, column_sums=sums)
    reader = make("h2o", 4).start(kv)
    # 0 and 2 received most of 0 to 3, and 4 is recent. All weights are equal: each receives 1/4 more.
    attended, out = step(reader, 0.0)
    assert attended == [[0, 2, 4, 5]]
    assert out == pytest.approx([(0 + 2 + 4 + 5) / 4])
    # Not recent any more, 4 (0.85) falls behind 0 (5.25) and 2 (0.95).
    attended, out = step(reader, 1.0)
    assert attended == [[0, 2, 5, 6]]
    assert out == pytest.approx([(0 + 2 + 13 * 5 + 6) / 16])
    # 5 has now 1/4 + 13/16 = 1.0625, more than 2 with 0.95 + 1/16 = 1.0125.
    attended, _ = step(reader, 0.0)
    assert attended == [[0, 5, 6, 7]]


def test_h2o_adds_up_the_heads_of_a_group(device):
    # Head 0 would keep token 1, head 1 token 2; together they have given 3 most.
    sums = torch.tensor([[[0.5, 2.0, 2.1, 2.5, 0.0]]])
    kv = layer(weighted([1] * 7), context=5, device=device, column_sums=sums)
    reader = make("h2o", 3).start(kv)  # one heavy, two recent
    assert step(reader, 0.0, 0.0)[0] == [[3, 4, 5]]
    # Each of two heads gave 1/3.
    assert reader._scores[0, 0].tolist() == pytest.approx([2.5 + 2 / 3, 2 / 3])


def test_h2o_needs_its_notes(device):
    kv = layer(weighted([1] * 6), context=5, device=device)
    with pytest.raises(ValueError, match="policy h2o needs what the prefill notes for it"):
        make("h2o", 4).start(kv)


def test_tova_drops_what_the_newest_attends_to_least_be_it_itself(device):
    # The context's last query attends by weight in head 0 and evenly in head 1; the means are 3/16, 1/4, 3/8, 3/16.
    kv = layer(weighted([1, 2, 4, 1, 1, 9]), context=4, device=device, last_queries=torch.tensor([[[[1.0]], [[0.0]]]]))
    reader = make("tova", 3).start(kv)
    attended, out = step(reader, 1.0, 0.0)
    assert attended == [[1, 2, 4]]
    assert out == pytest.approx([(2 * 1 + 4 * 2 + 1 * 4) / 7, (1 + 2 + 4) / 3])
    # Token 4 had (1/7 + 1/3) / 2, the least, and is gone although it is the latest.
    assert step(reader, 1.0, 0.0)[0] == [[1, 2, 5]]


def test_snapkv_thins_out_the_context_once(device):
    # A window of 3 (half of the budget). Token 2 has the weight of 10: with neighbours, 2, 3 and 4 come first.
    # The window's second head attends evenly, which favours none of them.
    queries = torch.tensor([1.0, 0.0])[None, :, None, None].expand(1, 2, 12, 1)
    kv = layer(weighted([1, 1, 10, 1, 1, 1, 1, 1, 6, 1, 1, 1, 1, 1]), context=12, device=device, last_queries=queries)
    policy = make("snapkv", 6)
    reader = policy.start(kv)
    attended, out = step(reader, 0.0, 1.0)
    assert attended == [[2, 3, 4, 9, 10, 11, 12]]
    assert out == pytest.approx([51 / 7, (10 * 2 + 49) / 16])
    assert step(reader, 0.0, 1.0)[0] == [[2, 3, 4, 9, 10, 11, 12, 13]]
    assert [policy.tokens_attended(12, length) for length in (13, 14)] == [7, 8]


def test_snapkv_keeps_what_fits(device):
    kv = layer(weighted([1] * 8), context=6, device=device)
    assert step(make("snapkv", 6).start(kv), 1.0)[0] == [[0, 1, 2, 3, 4, 5, 6]]


def test_streaming_numbers_positions_anew(device):
    # Keys and queries are (1, 0), turned by their position times an angle: scores are cosines of distances.
    angle = 0.3

    def turned(positions):
        return torch.stack([torch.cos(angle * positions), torch.sin(angle * positions)], -1)

    def rotate(keys, positions):
        turn = torch.tensor(angle * positions)
        x, y = keys.unbind(-1)
        return torch.stack([x * turn.cos() - y * turn.sin(), x * turn.sin() + y * turn.cos()], -1)

    keys = turned(torch.arange(10.0))[None]
    kv = layer(keys, context=9, device=device, rotate=rotate)
    attended, out = step(make("streaming", 6).start(kv), turned(torch.tensor(9.0)).tolist())
    assert attended == [[0, 1, 2, 3, 8, 9]]
    # As if these six were the whole sequence.
    weights = torch.tensor([math.cos(angle * (5 - place)) for place in range(6)]).softmax(0)
    assert out == pytest.approx([float(weights @ torch.tensor([0.0, 1, 2, 3, 8, 9]))])


def test_sparq_mixes_in_the_mean_value(device):
    # The query's largest component, -4 of (-4, 1, 0, 3), covers half of it: approximate scores are divided by
    # sqrt(4 * 1/2). Keys are made so that approximate weights are those of `few`, and exact ones those of `whole`.
    few = torch.tensor([1.0, 8, 1, 4, 1, 1]).log() * math.sqrt(4 * 1 / 2) / -4
    whole = torch.tensor([1.0, 1, 1, 2, 1, 4]).log() * math.sqrt(4)
    keys = torch.stack([few, whole + 4 * few, torch.zeros(6), torch.zeros(6)], -1)[None]
    kv = layer(keys, context=5, device=device, scale=4**-0.5)
    reader = SparQ("sparq", 4, rank=1).start(kv)
    attended, out = step(reader, (-4.0, 1.0, 0.0, 3.0))
    # The newest and the one before it, which a quarter of the budget forces, and the best two.
    assert attended == [[1, 3, 4, 5]]
    exact = (1 * 1 + 2 * 3 + 1 * 4 + 4 * 5) / 8
    share = (8 + 4 + 1 + 1) / 16
    assert out == pytest.approx([share * exact + (1 - share) * (0 + 1 + 2 + 3 + 4 + 5) / 6])


def test_sparq_chooses_for_the_group(device):
    # Component 1 is no head's largest, and the largest of the sum: 3 + 3 against 4.
    keys = torch.zeros(1, 8, 4)
    keys[0, 2, 0], keys[0, 3, 1], keys[0, 5, 2] = 9, 1, 9
    reader = SparQ("sparq", 2, rank=1).start(layer(keys, context=7, device=device))
    assert step(reader, (4.0, 3.0, 0.0, 0.0), (0.0, 3.0, 4.0, 0.0))[0] == [[3, 7]]


def test_the_token_oracle_takes_the_best_of_each_head(device):
    reader = make("token-oracle", 2).start(layer(weighted([1, 7, 2, 9, 3]), context=4, device=device))
    attended, out = step(reader, 1.0, -1.0)
    assert attended == [[1, 3], [0, 2]]
    assert out == pytest.approx([(7 * 1 + 9 * 3) / 16, (1 * 0 + 0.5 * 2) / 1.5])


@pytest.fixture
def loose(device):
    """Four pages of 8. Page 0 has no key like the query (1, 1), but its bounds do; page 2 has one that comes near."""
    keys = torch.zeros(1, 32, 64)
    keys[0, 0:4, 0] = keys[0, 4:8, 1] = 1.0
    keys[0, 18, :2] = 0.9
    return layer(keys, torch.zeros(1, 1, 32, 64, device=device), context=31, device=device)


def test_quest_goes_by_the_bound_and_the_page_oracle_by_the_keys(loose):
    query = (1.0, 1.0, *[0.0] * 62)
    for name, page in (("quest", 0), ("page-oracle", 2)):
        loose.length.set(31)
        reader = make(name, 16, page_size=8).start(loose)
        step(reader, query)
        assert reader.pages.tolist() == [[[page, 3]]], name


def test_the_window_is_the_first_page_and_the_latest(device):
    values = torch.arange(40.0).expand(64, 40).T[None, None].contiguous()
    kv = layer(torch.zeros(1, 40, 64), values.to(device), context=33, device=device)
    reader = make("window", 24, page_size=8).start(kv)
    # All weights are equal: the mean of the tokens of page 0, page 3, and page 4 as far as it is written.
    _, out = step(reader, [0.0] * 64)
    assert reader.pages.tolist() == [[[0, 3, 4]]]
    assert out == pytest.approx([(sum(range(8)) + sum(range(24, 34))) / 18])


# Counting


SHAPE = KVShape(query_heads=8, kv_heads=2, head_dim=64, itemsize=2)
TOKEN = 2 * 2 * 64 * 2
# At 1000 tokens, 63 pages, the last of 8 tokens: a budget of 64 reads three whole pages and that one.
PAGES = 3 * 16 + 8


@pytest.mark.parametrize(
    ("name", "attended", "read", "held"),
    [
        ("dense", 1000, 1000 * TOKEN, 1000 * TOKEN),
        ("quest", PAGES, (PAGES + 63) * TOKEN, 1063 * TOKEN),
        ("quest-sum", PAGES, (PAGES + 63) * TOKEN, 1063 * TOKEN),
        ("quest-meanstd", PAGES, (PAGES + 63) * TOKEN, 1063 * TOKEN),
        ("quest-shared", PAGES, (PAGES + 63) * TOKEN, 1063 * TOKEN),
        ("quest-nodense", PAGES, (PAGES + 63) * TOKEN, 1063 * TOKEN),
        # 2 bounds of 64 bytes and a scale of 4 for each KV head and page.
        ("quest-int8", PAGES, PAGES * TOKEN + 63 * 2 * 132, 1000 * TOKEN + 63 * 2 * 132),
        ("quest-head", PAGES, (4 * PAGES + 63) * TOKEN, 1063 * TOKEN),
        ("window", PAGES, PAGES * TOKEN, 1000 * TOKEN),
        ("h2o", 64, 64 * TOKEN, 64 * TOKEN),
        ("tova", 64, 64 * TOKEN, 64 * TOKEN),
        ("streaming", 64, 64 * TOKEN, 64 * TOKEN),
        # 64 of the context's 990 tokens and 10 behind it.
        ("snapkv", 74, 74 * TOKEN, 74 * TOKEN),
        # A quarter of the dimensions of all keys, 64 tokens, the mean value; keys are held twice.
        ("sparq", 64, 1000 * TOKEN // 8 + 64 * TOKEN + TOKEN // 2, 1500 * TOKEN + TOKEN // 2),
        # All keys, and the values that each of a group's 4 heads chose.
        ("token-oracle", 64, 500 * TOKEN + 4 * 32 * TOKEN, 1000 * TOKEN),
        ("page-oracle", PAGES, 500 * TOKEN + 4 * PAGES // 2 * TOKEN, 1000 * TOKEN),
    ],
)
def test_bytes_and_tokens_are_counted(name, attended, read, held):
    policy = make(name, 64)
    assert policy.tokens_attended(990, 1000) == attended
    assert policy.bytes_read(SHAPE, 990, 1000) == read
    assert policy.bytes_held(SHAPE, 990, 1000) == held


@pytest.mark.parametrize("name", NAMES)
def test_a_budget_that_holds_all_attends_to_all(name):
    assert make(name, 2048).tokens_attended(990, 1000) == 1000


# Making


def test_every_name_has_a_label_of_its_own():
    labels = {make(name, 64).label() for name in NAMES}
    assert len(labels) == len(NAMES)
    assert make("quest-nodense", 64, dense_layers=2).dense_layers == 0
    assert make("quest", 64, dense_layers=1, page_size=8) == make("quest", 64, dense_layers=1, page_size=8)


@pytest.mark.parametrize(
    ("name", "budget", "options", "message"),
    [
        ("best", 64, {}, "policy must be one of dense, quest, .*, got 'best'"),
        ("h2o", None, {}, "policy h2o needs a budget, a number of tokens"),
        ("h2o", 1, {}, "the budget of h2o must be at least 2 tokens, got 1"),
        ("streaming", 4, {}, "the budget of streaming must be at least 5 tokens, got 4"),
        ("page-oracle", 15, {}, "the budget of page-oracle must be at least 16 tokens, got 15"),
        ("window", 16, {}, "the budget of window must be at least 32 tokens, got 16"),
        ("quest", 8, {}, "budget must be at least a page, 16 tokens, got 8"),
        ("quest", 64, {"page_size": 12}, "page_size must be one of 4, 8, 16, 32, 64, 128, got 12"),
        ("dense", None, {"dense_layers": -1}, "dense_layers must be at least 0, got -1"),
    ],
)
def test_what_cannot_be_made_is_an_error(name, budget, options, message):
    with pytest.raises(ValueError, match=message):
        make(name, budget, **options)
