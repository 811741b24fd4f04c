"""The builds of the CPU loops: each one that this processor runs, forced by QUEST_OPS_ISA."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import torch_baseline
from helpers.operator_cases import HEAD_DIMS, KINDS, Case, Shape, assert_accurate, assert_same_bits
from quest_ops import build_info, ops, reference

ISAS = ("generic", "avx2", "avx512", "avx512_vnni")
INF = math.inf
HERE = Path(__file__).parent
SUITE = ("estimate", "scaled_bounds", "topk_pages", "sparse_decode", "append_kv", "decode_step", "determinism")


def environment(isa: str) -> dict[str, str]:
    """Of a process with this build; skips where the processor cannot run it."""
    forced = {**os.environ, "QUEST_OPS_ISA": isa}
    program = "import quest_ops; print(quest_ops.build_info['cpu_isa'])"
    done = subprocess.run([sys.executable, "-c", program], env=forced, text=True, capture_output=True, check=True)
    if done.stdout.strip() == "none":
        pytest.skip(f"this processor has no {isa}")
    assert done.stdout.strip() == isa
    return forced


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_the_operators(isa: str) -> None:
    """The operators' tests, with fewer examples. Without QUEST_OPS_ISA the suite itself runs the best set."""
    forced = {**environment(isa), "QUEST_OPS_TEST_EXAMPLES": "5"}
    if isa == build_info["cpu_isa"]:
        pytest.skip("the suite runs this one")
    files = [str(HERE / f"test_{name}.py") for name in SUITE]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, env=forced, text=True, capture_output=True, check=False, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


PROGRAM = """
import json, math, torch
from quest_ops import ops
q, k = torch.ones(1, 3, 64), torch.ones(100, 1, 16, 64)
k[:, :, :, 5] = -math.inf
table, lens = torch.arange(100, dtype=torch.int32)[None], torch.tensor([1597], dtype=torch.int32)
empty = ops.sparse_decode(q, k, torch.ones_like(k), table, lens)
k[50, 0, 3, 5] = 1
one = ops.sparse_decode(q, k, torch.ones_like(k), table, lens)
print(json.dumps([x.unique().tolist() for x in (*empty, *one)]))
"""


@pytest.mark.parametrize("isa", ISAS)
def test_infinite_scores(isa: str) -> None:
    forced = environment(isa)
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=forced, text=True, capture_output=True, check=True)
    assert json.loads(done.stdout) == [[0.0], [-INF], [1.0], [8.0]]


SCORES = """
import sys, torch
from quest_ops import ops
torch.set_num_threads(1)
torch.save([ops.estimate(*arguments) for arguments in torch.load(sys.argv[1])], sys.argv[1])
"""


def any_bytes(dtype: torch.dtype, head_dim: int, group: int, spread: float) -> Case:
    """Bounds of every byte, -128 too, and queries whose elements differ by powers of ten."""
    case = Case(
        Shape(dtype, head_dim, 16, 2, group, lengths=(16 * 19, 5), kind=KINDS["minmax-8-bit"], seed=head_dim + group)
    )
    case.q = (case.randn(*case.q.shape) * torch.exp(spread * case.randn(*case.q.shape))).to(dtype)
    case.k_bounds = torch.randint(-128, 128, case.k_bounds.shape, generator=case.random, dtype=torch.int8)
    return case


@pytest.mark.parametrize("isa", ISAS)
def test_scores_of_any_bytes(isa: str, tmp_path: Path) -> None:
    """By the error rule, whether products are made in float32 or of bytes."""
    forced = environment(isa)
    dtypes = (torch.float32, torch.bfloat16)
    cases = [any_bytes(dtypes[i % 2], D, (1, 2, 4, 7)[i % 4], 3 * (i >= 6)) for i, D in enumerate(2 * HEAD_DIMS)]
    arguments = [(*case.scoring, 16, case.k_scales) for case in cases]
    file = tmp_path / "cases.pt"
    torch.save(arguments, file)
    subprocess.run([sys.executable, "-c", SCORES, str(file)], env=forced, check=True)
    for case, these, scores in zip(cases, arguments, torch.load(file), strict=True):
        (like,) = torch_baseline.in_several_orders(torch_baseline.estimate, *these)
        assert_accurate(scores, reference.estimate(*these), like, case.shape.dtype)


def test_a_query_that_is_not_finite_leaves_the_others_alone() -> None:
    """Its neighbours in a tile keep their bits, and so does it in float32."""
    case = any_bytes(torch.float32, 128, 7, 1)
    arguments = (*case.scoring[1:], 16, case.k_scales)
    before = ops.estimate(case.q, *arguments)
    q = case.q.clone()
    q[0, 2, 5], q[0, 6, 9], q[1, 11, 0] = math.nan, INF, -INF
    after, exact = ops.estimate(q, *arguments), reference.estimate(q, *arguments)
    finite = q.isfinite().all(-1)
    assert_same_bits(after[finite], before[finite])
    for b, h in (~finite).nonzero().tolist():
        pages = reference.num_pages(case.shape.lengths[b], 16)
        assert_same_bits(after[b, h, :pages].isfinite(), torch.zeros(pages, dtype=torch.bool))
        assert_same_bits(after[b, h, :pages].isnan(), exact[b, h, :pages].isnan())
