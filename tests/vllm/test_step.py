"""A step's tokens as rows, against a loop over them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quest_ops.vllm.step import count_sparse, dense_tokens, sparse_rows

# New tokens of each request, and how many of them, its last, are generated ones.
requests = st.lists(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), min_size=1)


def tensors(query_lens: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    B = len(query_lens)
    start_lens = torch.arange(100, 100 + B, dtype=torch.int32)
    page_table = torch.arange(5 * B, dtype=torch.int32).view(B, 5)
    return page_table, start_lens, start_lens + torch.from_numpy(query_lens).int()


@given(requests)
def test_each_sparse_token_has_its_place_and_sees_its_past(drawn: list[tuple[int, int]]) -> None:
    query_lens, num_sparse = np.array(drawn).T
    page_table, start_lens, seq_lens = tensors(query_lens)
    rows = sparse_rows(query_lens, num_sparse, page_table, start_lens, seq_lens)
    total = int(query_lens.sum())
    x = torch.arange(1.0, total + 1)[:, None, None].expand(total, 2, 3)
    out = torch.zeros(total, 2, 3)
    expected: dict[int, tuple[list[int], int]] = {}
    first = 0
    for request, (n, sparse) in enumerate(drawn):
        for t in range(n - sparse, n):
            expected[first + t] = (page_table[request].tolist(), 100 + request + t + 1)
        first += n
    if rows is None:
        assert not expected
        return
    packed = rows.pack(x)
    assert packed.shape == (len(rows.seq_lens), rows.num_new, 2, 3)
    assert rows.num_new <= 8
    found = {}
    for r, row in enumerate(packed[:, :, 0, 0].tolist()):
        real = rows.num_new if rows.new_lens is None else int(rows.new_lens[r])
        for t in range(real):
            seen = int(rows.seq_lens[r]) - real + t + 1
            found[int(row[t]) - 1] = (rows.page_table[r].tolist(), seen)
            assert int(rows.token_lens()[r * rows.num_new + t]) == seen
        assert torch.equal(rows.seq_lens[r] - rows.start_lens[r], torch.tensor(real, dtype=torch.int32))
        assert not rows.token_lens()[r * rows.num_new + real : (r + 1) * rows.num_new].any()
    assert found == expected
    rows.unpack(packed, out)
    sparse = torch.zeros(total, dtype=torch.bool)
    sparse[list(expected)] = True
    assert torch.equal(out, x.where(sparse[:, None, None], 0))


@given(requests)
def test_dense_tokens_are_all_others_in_their_order(drawn: list[tuple[int, int]]) -> None:
    query_lens, num_sparse = np.array(drawn).T
    found, tokens = dense_tokens(query_lens, num_sparse)
    places = np.arange(query_lens.sum())[tokens].tolist()
    ends = np.cumsum(query_lens)
    assert found.tolist() == [r for r, (n, sparse) in enumerate(drawn) if sparse < n]
    assert places == [t for r in found for t in range(ends[r] - query_lens[r], ends[r] - num_sparse[r])]


@pytest.mark.parametrize("new", [1, 5, 8])
def test_decode_steps_are_views(new: int) -> None:
    query_lens = np.array([new] * 3 + [0] * 2)  # two idle rows of a graph
    page_table, start_lens, seq_lens = tensors(query_lens)
    rows = sparse_rows(query_lens, query_lens, page_table, start_lens, seq_lens)
    assert rows is not None
    assert (rows.num_new, rows.new_lens, rows.tokens) == (new, None, None)
    for view, tensor in ((rows.page_table, page_table), (rows.start_lens, start_lens), (rows.seq_lens, seq_lens)):
        assert view.data_ptr() == tensor.data_ptr()
        assert len(view) == 5
    x = torch.randn(5 * new, 2, 3)
    assert rows.pack(x).data_ptr() == x.data_ptr()


def test_tokens_of_a_prompt_are_dense_and_generated_ones_are_not() -> None:
    query_lens, seq_lens = np.array([1, 4, 300, 300, 1]), np.array([80, 84, 300, 300, 20])
    # Decoding, a verification, a first chunk, a resumed request of 250 prompt tokens, the last token of a prompt.
    prompts = np.array([10, 10, 700, 250, 20])
    assert count_sparse(query_lens, seq_lens, prompts, None).tolist() == [1, 4, 0, 50, 0]
    prefilling = np.array([False, False, True, True, True])
    assert count_sparse(query_lens, seq_lens, None, prefilling).tolist() == [1, 4, 0, 0, 0]
    assert count_sparse(query_lens, None, None, None).tolist() == [1, 4, 0, 0, 1]
