"""vLLM with Quest, on real models: the bundled retrieval model, SmolLM2 and small random ones."""

import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import quest_ops.vllm
import torch
from helpers.vllm_engine import generate, log_probabilities, prompt, run_engine
from quest_ops import PagedKVCache, QuestConfig, quest_attention, select_pages, update_bounds

pytest.importorskip("vllm.config", reason="vLLM is not installed: `make test-vllm` runs this")
pytestmark = pytest.mark.slow
Engine = Callable[..., AbstractContextManager[Any]]

# Ragged, the second starts with the first, the last is shorter than a block. Chunks of 512 tokens cut the longer ones.
RAGGED = [prompt(0, 700), prompt(0, 1501), prompt(3000, 900), prompt(5000, 20)]
CHUNKED = {"max_num_batched_tokens": 512}
# Larger than any request here and smaller than the engine's longest: the sparse path, with all pages.
FULL = {"budget": 2048, "dense_layers": 1}
SMALL = {"budget": 256, "dense_layers": 1}
# Bytes of a block of the bundled model in float32, in 6 layers, with bounds.
BLOCK = 6 * (2 * 2 * 32 * 64 * 4 + 256)


@pytest.fixture
def engine() -> Engine:
    return run_engine


@contextmanager
def watch(monkeypatch: pytest.MonkeyPatch, method: str) -> Iterator[list[tuple[Any, ...]]]:
    """The calls of a method of the backend's implementation: the implementation and its arguments."""
    from quest_ops.vllm.cpu import CPUQuestImpl

    calls: list[tuple[Any, ...]] = []
    original = getattr(CPUQuestImpl, method)

    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append((self, *args, *kwargs.values()))
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(CPUQuestImpl, method, called)
        yield calls


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_full_budget_gives_the_tokens_of_vllm_as_it_is(engine: Engine, block_size: int) -> None:
    with engine(block_size=max(block_size, 32), **CHUNKED) as llm:  # vLLM itself wants multiples of 32
        stock = generate(llm, RAGGED)
    with engine(FULL, block_size=block_size, **CHUNKED) as llm:
        assert generate(llm, RAGGED) == stock
        assert generate(llm, RAGGED) == stock  # from the prefix cache


def test_full_budget_in_bfloat16_differs_from_vllm_at_near_ties_alone(engine: Engine) -> None:
    """Two kernels round differently in 8 bits. Behind its first difference a request has another context."""
    settings = {"dtype": "bfloat16", "block_size": 32, **CHUNKED}
    with engine(**settings) as llm:
        stock = log_probabilities(llm, RAGGED)
    with engine(FULL, **settings) as llm:
        answers = generate(llm, RAGGED)
    for answer, best in zip(answers, stock, strict=True):
        for token, logprobs in zip(answer, best, strict=True):
            if token == max(logprobs, key=logprobs.__getitem__):
                continue
            assert max(logprobs.values()) - logprobs[token] < 0.1
            break


@pytest.mark.parametrize("group_reduce", ["max", "none", "soft"])
def test_a_request_alone_gives_the_tokens_of_the_batch(engine: Engine, group_reduce: str) -> None:
    with engine({**SMALL, "group_reduce": group_reduce, "bounds": "cache"}, **CHUNKED) as llm:
        batch = generate(llm, RAGGED)
        assert [generate(llm, [p])[0] for p in RAGGED] == batch
        assert llm.reset_prefix_cache()
        assert [generate(llm, [p])[0] for p in RAGGED] == batch


@pytest.mark.parametrize("bounds", ["int4", "cache"])
def test_pages_are_those_of_quest_attention(engine: Engine, monkeypatch: pytest.MonkeyPatch, bounds: str) -> None:
    settings = {**SMALL, "bounds": bounds, "sink_pages": 1}
    with (
        engine(settings, **CHUNKED) as llm,
        watch(monkeypatch, "forward") as forwards,
        watch(monkeypatch, "_count") as counted,
    ):
        assert len(generate(llm, [prompt(0, 1200)])[0]) == 16
    impl = next(impl for impl, *_ in counted if impl.quest.index == 3)
    steps = [(q, k, v, out) for i, _, q, k, v, _, _, out, *_ in forwards if i is impl]
    engine_pages = [pages for i, _, pages in counted if i is impl]
    assert [len(q) for q, *_ in steps] == [512, 512, 176] + [1] * 15

    chosen: list[torch.Tensor] = []

    def select(layer: int, q: torch.Tensor, pages: Any, config: QuestConfig) -> torch.Tensor:
        quest = (pages.k_bounds, pages.page_table, pages.seq_lens, config, pages.scale, pages.k_scales)
        chosen.append(select_pages(q, *quest))
        return chosen[-1]

    config = QuestConfig(page_size=32, selector=select, **{**settings, "dense_layers": 0})
    cache = PagedKVCache(1, 2, 64, max_tokens=1300, page_size=32, bounds=config.bounds, dtype=torch.float32)
    for q, k, v, out in steps:
        cache.advance(len(q))
        expected = quest_attention(q[None], k[None], v[None], cache, 0, config, impl.scale)[0]
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert len(chosen) == len(engine_pages) == 15
    assert all(torch.equal(a, b) for a, b in zip(chosen, engine_pages, strict=True))


def test_shared_and_reused_blocks_have_the_bounds_of_their_keys(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 40 blocks: each round takes most of them, so the next overwrites blocks and bounds of the last.
    blocks = []
    with (
        engine(SMALL, kv_cache_memory_bytes=40 * BLOCK, max_model_len=1024) as llm,
        watch(monkeypatch, "_decode") as decodes,
    ):
        for start in (0, 1000, 0, 2500, 1000):
            generate(llm, [prompt(start, 500), prompt(start, 600)], 4)
            _, rows, _, _, _, (k_cache, _, k_bounds), k_scales, _ = decodes[-1]
            fresh, scales = torch.zeros_like(k_bounds), torch.zeros_like(k_scales)
            update_bounds(k_cache, fresh, rows.page_table, rows.seq_lens, None, scales, QuestConfig().std_factor)
            used = [
                page
                for table, tokens in zip(rows.page_table.tolist(), rows.seq_lens.tolist(), strict=True)
                for page in table[: -(-tokens // 32)]
            ]
            assert torch.equal(k_bounds[used], fresh[used])
            assert torch.equal(k_scales[used], scales[used])
            assert len(set(used)) < len(used)  # shared
            blocks.append(set(used))
    assert any(a & b for a, b in itertools.pairwise(blocks))  # reused


def test_preempted_requests_give_the_tokens_of_a_run_by_themselves(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    draw = random.Random(0)
    prompts = [prompt(draw.randrange(20_000), draw.randrange(5, 300)) for _ in range(200)]
    counts = [draw.randrange(1, 80) for _ in prompts]
    preempted = []
    preempt = Scheduler._preempt_request

    def counting(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append((request.num_prompt_tokens, request.num_tokens))
        return preempt(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", counting)
    small, short = {"budget": 64, "dense_layers": 1}, {"max_model_len": 416, "max_num_seqs": 32}
    with engine(small, kv_cache_memory_bytes=24 * BLOCK, **short) as llm:
        together = generate(llm, prompts, counts)
    # Of some, more generated tokens are computed anew than a row of the operators has.
    assert sum(total > given + 8 for given, total in preempted) >= 10
    with engine(small, enable_prefix_caching=False, **short) as llm:
        alone = [generate(llm, [p], n)[0] for p, n in zip(prompts, counts, strict=True)]
    assert together == alone


def test_seven_drafted_tokens(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    # Text that repeats itself: drafts from its n-grams are accepted, or not, in different numbers for each request.
    prompts = [prompt(start, 300) * 3 for start in (0, 2000, 4000)] + [list(range(0, 250, 2)), prompt(9000, 500)]
    speculative = {"method": "ngram", "num_speculative_tokens": 7, "prompt_lookup_max": 5, "prompt_lookup_min": 2}
    with engine(SMALL) as llm:
        expected = generate(llm, prompts, 40)
    with engine(SMALL, speculative_config=speculative) as llm, watch(monkeypatch, "_decode") as decodes:
        assert generate(llm, prompts, 40) == expected
    rows = [rows for _, rows, *_ in decodes]
    assert max(x.num_new for x in rows) == 8
    assert any(x.new_lens is not None and len(x.new_lens.unique()) > 1 for x in rows)  # ragged


def test_dtype_of_amx_with_prompts_in_chunks(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine({**SMALL, "budget": 128}, dtype="bfloat16", block_size=64, **CHUNKED) as llm:
        with watch(monkeypatch, "_select_and_attend") as mixed:
            batch = generate(llm, RAGGED)
        assert mixed, "no step had prompt tokens and generated ones"
        assert [generate(llm, [p])[0] for p in RAGGED] == batch


def test_sliding_layers_run_by_vllm(engine: Engine, tmp_path: Any) -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"] * 2
    config = Gemma3TextConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, sliding_window=64, layer_types=kinds, query_pre_attn_scalar=64,
        max_position_embeddings=4096,
    )  # fmt: skip
    Gemma3ForCausalLM(config).save_pretrained(tmp_path)
    settings = {"model": str(tmp_path), "max_model_len": 2048, **CHUNKED}
    with engine(**settings) as llm:
        stock = generate(llm, RAGGED)
    with engine({"budget": 1600, "dense_layers": 0}, **settings) as llm:
        assert generate(llm, RAGGED) == stock
        (plans,) = llm.collective_rpc("quest_plan")
        assert [(layer, path) for layer, path, _ in plans] == list(enumerate(["dense", "sparse"] * 2))
        assert plans[0][2] == "a window of 64 tokens"


def test_budgets_by_layer_and_the_report(engine: Engine) -> None:
    budgets = [4096, 4096, 512, 256, 128, 4096]
    with engine({"budget": budgets, "dense_layers": 0, "report": 0}) as llm:
        generate(llm, [prompt(0, 1000), prompt(2000, 1000)], 11)
        (report,) = quest_ops.vllm.report(llm)
    paths = [x.plan.path for x in report]
    assert paths == ["dense", "dense", "sparse", "sparse", "sparse", "dense"]
    for x in report[2:5]:
        pages = 2 * 2 * 10 * (budgets[x.plan.layer] // 32)  # requests, KV heads and steps
        assert (x.prefills, x.steps, x.pages_read) == (1, 10, pages)
        assert x.pages_held == 2 * 2 * sum(-(-(1000 + t) // 32) for t in range(1, 11))
        assert x.share < 0.6


def test_the_report_is_in_the_log_where_asked(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    import logging

    logging.getLogger("vllm").addHandler(caplog.handler)
    try:
        with engine({**SMALL, "report": 0.001}) as llm, caplog.at_level(logging.INFO, "vllm.quest_ops"):
            generate(llm, [prompt(0, 1000)], 4)
        assert "Quest: pages read, by layer" in caplog.text
    finally:
        logging.getLogger("vllm").removeHandler(caplog.handler)


def test_the_memory_profile_knows_of_the_bounds(engine: Engine) -> None:
    space, layers, block = 2**26, 6, 2 * 2 * 32 * 64 * 4
    blocks = []
    for quest in (None, SMALL):
        with engine(quest, kv_cache_memory_bytes=space) as llm:
            blocks.append(llm.llm_engine.vllm_config.cache_config.num_gpu_blocks)
    bounds = 256  # 2 heads x (2 x 32 bytes and a scale), aligned to 256
    assert blocks == [space // (layers * block), space // (layers * (block + bounds))]


def test_off_unless_asked_for(engine: Engine) -> None:
    with engine() as llm:
        assert "quest" not in llm.llm_engine.vllm_config.additional_config
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        assert all(getattr(layer.impl, "quest", None) is None for layer in layers.values())


def test_smollm2_gives_its_tokens_at_full_budget(engine: Engine) -> None:
    smollm2 = pytest.importorskip("quest_eval.smollm2")
    if not smollm2.is_there():
        pytest.skip(f"SmolLM2 is not in {smollm2.folder()}: `make eval-model` fetches it")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2.folder())
    text = tokenizer(bytes(prompt(0, 12_000)).decode())["input_ids"]
    prompts = [text[:900], text[:1300], text[1500:1900], text[40:60]]
    settings = {"model": str(smollm2.folder()), "kv_cache_memory_bytes": 2**29, **CHUNKED}
    with engine(**settings) as llm:
        stock = generate(llm, prompts)
    with engine({"budget": 2048}, **settings) as llm:
        assert generate(llm, prompts) == stock
    with engine({"budget": 256}, **settings) as llm:
        sparse = generate(llm, prompts)
        assert [generate(llm, [p])[0] for p in prompts] == sparse
