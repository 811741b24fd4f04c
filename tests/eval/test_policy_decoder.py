"""The policy decoder: against transformers' own attention and generation, in batches, repeatedly, on bad input."""

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")

from helpers.hf_models import make_model, prompt
from quest_eval import bundled_model
from quest_eval.decoding import attention_function
from quest_eval.decoding.policy_decoder import PolicyDecoder
from quest_eval.policies import NAMES, make
from quest_eval.tasks.text import standard_library_text
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

CONTEXT, QUESTION = 100, 5


def ids_of(rows=1, tokens=CONTEXT + QUESTION, device="cpu", seed=1):
    return prompt(tokens, device, seed, (0,) * rows)["input_ids"]


def prefilled(model, ids, policies, batch_size=None, **options):
    decoder = PolicyDecoder(model, max_tokens=CONTEXT + 60, batch_size=batch_size or len(ids))
    decoder.prefill(ids, policies=policies, **options)
    return decoder


def transformers_scores(model, ids, start):
    """log p of ids[:, start:] by transformers' own attention."""
    with torch.no_grad():
        logits = model(ids).logits[:, start - 1 : -1].float()
    return logits.log_softmax(-1).gather(-1, ids[:, start:, None])[..., 0]


# Against transformers


@pytest.mark.parametrize("name", NAMES)
def test_a_budget_that_holds_all_gives_the_dense_scores(device, name):
    ids = ids_of(2, device=device)
    wanted = transformers_scores(make_model(device=device), ids, CONTEXT)
    policy = make(name, 512)
    decoder = prefilled(make_model(device=device), ids[:, :CONTEXT], [policy])
    torch.testing.assert_close(decoder.score(policy, ids[:, CONTEXT:]), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma3"])
def test_dense_answers_are_transformers_own(device, kind):
    model, ids = make_model(kind, device), ids_of(2, device=device)
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    dense = make("dense", None)
    decoder = prefilled(model, ids[:, :CONTEXT], [dense])
    assert torch.equal(decoder.generate(dense, ids[:, CONTEXT:], 8), wanted[:, -8:])


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e4},
        # Multiplies keys by a factor as well as turning them.
        {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 512},
    ],
)
def test_streaming_moves_keys_as_the_model_would(device, rope):
    config = Qwen3Config(hidden_size=64, head_dim=64, num_hidden_layers=1, vocab_size=96, rope_parameters=rope)
    model = Qwen3ForCausalLM(config).to(device)
    raw = torch.randn(1, 2, 3, 64, generator=torch.Generator().manual_seed(0)).to(device)
    assert (rope["rope_type"] == "yarn") == (model.model.rotary_emb.attention_scaling != 1)

    def at(first):
        cos, sin = model.model.rotary_emb(raw, torch.arange(first, first + 3, device=device)[None])
        return apply_rotary_pos_emb(raw, raw, cos, sin)[1]

    torch.testing.assert_close(attention_function.rotation(model)(at(0), 50), at(50), rtol=1e-4, atol=1e-4)


def test_notes_of_the_prefill_are_those_of_eager_attention(device):
    model, ids = make_model(device=device), ids_of(2, CONTEXT, device)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(ids, output_attentions=True).attentions  # a layer: [B, Hq, L, L]
    decoder = prefilled(make_model(device=device), ids, [make("h2o", 32)], chunk=37)
    assert decoder._layers[0].column_sums is None, "a dense layer"
    kv = decoder._layers[2]
    wanted = weights[2].sum(2).unflatten(1, (2, -1)).sum(2)
    torch.testing.assert_close(kv.column_sums, wanted, rtol=1e-3, atol=1e-3)
    scores = kv.last_queries[:, :, -1:] @ kv.k[:, :, :CONTEXT].repeat_interleave(2, 1).transpose(-1, -2)
    torch.testing.assert_close((scores * kv.scale).softmax(-1), weights[2][:, :, -1:], rtol=1e-3, atol=1e-4)


# Batches, chunks, repetition


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_batch_do_not_see_each_other(device, name):
    policy, ids = make(name, 32), ids_of(3, device=device)
    together = prefilled(make_model(device=device), ids[:, :CONTEXT], [policy], batch_size=4)
    scores = together.score(policy, ids[:, CONTEXT:])
    for row in range(3):
        alone = prefilled(make_model(device=device), ids[row : row + 1, :CONTEXT], [policy])
        torch.testing.assert_close(
            alone.score(policy, ids[row : row + 1, CONTEXT:])[0], scores[row], rtol=1e-3, atol=2e-3
        )


def test_chunks_change_nothing(device):
    policies, ids, told = [make("h2o", 32), make("snapkv", 32)], ids_of(2, device=device), []
    whole = prefilled(make_model(device=device), ids[:, :CONTEXT], policies)
    chunked = prefilled(make_model(device=device), ids[:, :CONTEXT], policies, chunk=30, progress=told.append)
    assert told == [30, 30, 30, 10] * 2
    for policy in policies:
        pair = [decoder.score(policy, ids[:, CONTEXT:]) for decoder in (whole, chunked)]
        torch.testing.assert_close(*pair, rtol=1e-3, atol=2e-3)


def test_every_call_starts_behind_the_context(device):
    policies, ids = [make(name, 32) for name in NAMES], ids_of(device=device)
    decoder = prefilled(make_model(device=device), ids[:, :CONTEXT], policies)
    first = [decoder.score(policy, ids[:, CONTEXT:]) for policy in policies]
    for policy, scores in zip(policies, first, strict=True):
        steps = []
        decoder.generate(policy, ids[:, CONTEXT:], 20, on_step=lambda steps=steps: steps.append(1))
        assert len(steps) == QUESTION + 19
        assert torch.equal(decoder.score(policy, ids[:, CONTEXT:]), scores)


def test_a_new_text_replaces_the_old(device):
    policy, ids, others = make("quest", 32), ids_of(device=device), ids_of(device=device, seed=2)
    fresh = prefilled(make_model(device=device), ids[:, :CONTEXT], [policy])
    used = prefilled(make_model(device=device), others[:, :CONTEXT], [policy])
    used.score(policy, others[:, CONTEXT:])
    used.prefill(ids[:, :CONTEXT], policies=[policy])
    assert torch.equal(*(decoder.score(policy, ids[:, CONTEXT:]) for decoder in (fresh, used)))
    with pytest.raises(ValueError, match="policy quest with budget 64 has not run on these contexts"):
        used.usage(make("quest", 64))


def test_what_ends_an_answer_fills_it_up(device):
    dense, ids = make("dense", None), ids_of(2, device=device)
    decoder = prefilled(make_model(device=device), ids[:, :CONTEXT], [dense])
    answer = decoder.generate(dense, ids[:, CONTEXT:], 40)
    eos = int(answer[0, 3])
    ended = decoder.generate(dense, ids[:, CONTEXT:], 40, eos=eos)
    for row in range(2):
        same = (answer[row] == eos).nonzero()
        end = int(same[0]) if len(same) else 40
        assert torch.equal(ended[row, :end], answer[row, :end])
        assert (ended[row, end:] == eos).all()


def test_halves_of_precision_run(device):
    model = bundled_model.load(device, torch.bfloat16)
    text = standard_library_text(300)
    ids = torch.tensor([list(text)])
    policies = [make(name, 32) for name in NAMES]
    decoder = PolicyDecoder(model, max_tokens=300)
    decoder.prefill(ids[:, :290], policies=policies)
    for policy in policies:
        scores = decoder.score(policy, ids[:, 290:])
        assert scores.dtype == torch.float32
        assert scores.isfinite().all(), policy


@pytest.mark.parametrize("name", NAMES)
def test_decoding_waits_for_nothing(name):
    """A model without data: whatever read a number of a tensor on the host, transformers included, would raise."""
    with FakeTensorMode():
        model = Qwen3ForCausalLM(Qwen3Config(hidden_size=64, head_dim=64, num_hidden_layers=3, vocab_size=96)).eval()
        ids, policy = torch.zeros(2, CONTEXT + QUESTION, dtype=torch.long), make(name, 32)
        decoder = prefilled(model, ids[:, :CONTEXT], [policy])
        assert decoder.score(policy, ids[:, CONTEXT:]).shape == (2, QUESTION)
        assert decoder.generate(policy, ids[:, CONTEXT:], 4).shape == (2, 4)


# What is told


def test_the_observer_sees_what_each_layer_read(device):
    ids, seen = ids_of(2, device=device), []
    policies = [make(name, 32) for name in ("quest", "quest-head", "h2o", "tova", "dense")]
    decoder = prefilled(make_model(device=device), ids[:, :CONTEXT], policies)
    decoder.observer = lambda layer, info: seen.append((layer, info.length, info.pages, info.tokens, info.recall()))
    for policy in policies:
        seen.clear()
        decoder.score(policy, ids[:, CONTEXT:])
        assert [entry[:2] for entry in seen] == [(layer, n) for n in range(101, 105) for layer in range(3)]
        for layer, length, pages, tokens, recall in seen:
            assert recall.shape == (2, 4)
            assert ((recall > 0) & (recall < 1.00001)).all()
            if layer < 2 or policy.name == "dense":
                assert pages is None and tokens is None
                torch.testing.assert_close(recall, torch.ones_like(recall))
            elif policy.name.startswith("quest"):
                assert pages.shape == (2, 4 if policy.name == "quest-head" else 2, 2)
                assert (pages[..., -1] == (length - 1) // 16).all()
            else:
                assert tokens.shape == (2, 1 if policy.name == "tova" else 2, 32)
                assert (tokens[..., -1] == length - 1).all()


def test_usage_is_a_mean_of_the_steps(device):
    ids, policies = ids_of(device=device), [make("streaming", 32), make("dense", None)]
    decoder = prefilled(make_model(device=device), ids[:, :CONTEXT], policies)
    token = 2 * 2 * 64 * 4
    for policy in policies:
        decoder.generate(policy, ids[:, CONTEXT:], 3)  # 5 tokens of the question and 2 of the answer
    usage, dense = (decoder.usage(policy) for policy in policies)
    assert dense.tokens_attended == 104
    assert dense.kv_bytes_read == pytest.approx(dense.kv_bytes_dense) == 104 * token
    assert dense.kv_bytes_held == pytest.approx(107 * token)
    assert usage.tokens_attended == 32
    assert usage.kv_bytes_read == pytest.approx((2 * 104 + 32) / 3 * token)
    assert usage.kv_bytes_held == pytest.approx((2 * 107 + 32) / 3 * token)
    assert usage.kv_bytes_dense == 104 * token


# Bad input


def test_bad_input_is_an_error(device):
    model, ids, quest = make_model(device=device), ids_of(2, device=device), make("quest", 32)
    with pytest.raises(ValueError, match="max_tokens and batch_size must be at least 1, got 0 and 1"):
        PolicyDecoder(model, max_tokens=0)
    with pytest.raises(ValueError, match="page_size must be one of 4, 8, 16, 32, 64, 128, got 7"):
        PolicyDecoder(model, max_tokens=10, page_size=7)
    decoder = PolicyDecoder(model, max_tokens=CONTEXT + 4, batch_size=2)
    with pytest.raises(ValueError, match="the decoder has no context"):
        decoder.generate(quest, ids, 1)
    for wrong in (ids_of(3, 10), ids_of(1, CONTEXT + 4)):
        with pytest.raises(ValueError, match=r"ids must have at most 2 rows and 103 columns, .* got \[[13], "):
            decoder.prefill(wrong, policies=[quest])
    decoder.prefill(ids[:, :CONTEXT], policies=[quest])
    with pytest.raises(ValueError, match="max_tokens must be at least 105, for 100 tokens of context and 5 behind it"):
        decoder.generate(quest, ids[:, CONTEXT : CONTEXT + 3], 3)
    with pytest.raises(ValueError, match=r"ids must be \[2, T\], .* got \[1, 3\]"):
        decoder.score(quest, ids[:1, :3])
    decoder._rotate = None
    with pytest.raises(
        ValueError, match="policy streaming numbers rotary positions anew, and Qwen3ForCausalLM has none"
    ):
        decoder.prefill(ids[:, :CONTEXT], policies=[make("streaming", 32)])
    with pytest.raises(ValueError, match="policy h2o needs what the prefill notes for it"):
        decoder.score(make("h2o", 32), ids[:, CONTEXT : CONTEXT + 3])


def test_models_that_do_not_fit_are_errors():
    with pytest.raises(ValueError, match="full attention in all layers, .* got MistralForCausalLM with sliding_attent"):
        PolicyDecoder(make_model("mistral sliding"), max_tokens=10)
    with pytest.raises(ValueError, match="GptOssForCausalLM has learned attention sinks"):
        PolicyDecoder(make_model("gpt-oss"), max_tokens=10)
    with pytest.raises(ValueError, match="head_dim of .* must be one of 64, 80, .* got 32"):
        PolicyDecoder(make_model(head_dim=32), max_tokens=10)


def test_the_model_by_itself_says_what_to_do():
    model = make_model("llama")
    PolicyDecoder(model, max_tokens=10)
    with pytest.raises(ValueError, match=r"model.set_attn_implementation\('sdpa'\)"), torch.no_grad():
        model(ids_of(1, 5))
