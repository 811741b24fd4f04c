"""What Quest refuses in an engine: one sentence, when the engine is configured."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm.config", reason="vLLM is not installed: `make test-vllm` runs this")

from quest_eval.bundled_model import FOLDER
from quest_ops.vllm import plugin
from quest_ops.vllm.settings import RefusedError
from vllm.engine.arg_utils import EngineArgs

QUEST = {"quest": {"budget": 256}}


def configure(**settings: Any) -> Any:
    defaults = {"model": str(FOLDER), "skip_tokenizer_init": True, "dtype": "float32", "block_size": 32}
    return EngineArgs(**{**defaults, "additional_config": QUEST, **settings}).create_engine_config()


def model_with(folder: Path, **changes: Any) -> str:
    config = json.loads((FOLDER / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return str(folder)


def refused(sentence: str, **settings: Any) -> None:
    with pytest.raises(RefusedError) as error:
        configure(**settings)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_the_engine_of_the_other_tests_is_not_refused() -> None:
    config = configure()
    assert config.additional_config["quest"]["page_size"] == 32
    assert config.parallel_config.worker_extension_cls == "quest_ops.vllm.worker.QuestWorker"


def test_settings() -> None:
    refused("budget must be a multiple of the block size, 32, got 200", additional_config={"quest": {"budget": 200}})
    refused('additional_config["quest"] must be a dict', additional_config={"quest": "on"})
    refused("takes blocks of 4, 8, 16, 32, 64, 128 tokens, got 48", block_size=48)
    refused("page_size must be the engine's block size, 128, got 16", block_size=None,
            additional_config={"quest": {"page_size": 16}})  # fmt: skip


def test_cache_dtype() -> None:
    refused("needs keys and values in the model's dtype, float32: kv_cache_dtype must be auto, got fp8",
            kv_cache_dtype="fp8")  # fmt: skip


def test_head_dim(tmp_path: Path) -> None:
    refused("takes a head_dim of 64, 80, 96, 128, 192, 256, got 32", model=model_with(tmp_path, head_dim=32))


def test_mla(tmp_path: Path) -> None:
    from transformers import DeepseekV2Config

    config = DeepseekV2Config(num_hidden_layers=2, hidden_size=256, vocab_size=256)
    config.architectures = ["DeepseekV2ForCausalLM"]
    config.save_pretrained(tmp_path)
    refused("does not work with multi-head latent attention (MLA)", model=str(tmp_path), block_size=None)


def test_hybrid(tmp_path: Path) -> None:
    from transformers import FalconH1Config

    config = FalconH1Config(num_hidden_layers=2, hidden_size=256, vocab_size=256)
    config.architectures = ["FalconH1ForCausalLM"]
    config.save_pretrained(tmp_path)
    refused("does not work with hybrid models", model=str(tmp_path), block_size=None)


def test_too_many_drafted_tokens() -> None:
    refused("takes at most 7 drafted tokens a step, got 8",
            speculative_config={"method": "ngram", "num_speculative_tokens": 8, "prompt_lookup_max": 4})  # fmt: skip


def test_a_worker_extension_of_another() -> None:
    refused("needs worker_extension_cls: derive builtins.object from", worker_extension_cls="builtins.object")


def test_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.__version__", "0.99.1")
    refused("was tested with vLLM 0.32 only, got 0.99.1")


@pytest.mark.parametrize("variable", ["budget=256,dense_layers=1", '{"budget": 256, "dense_layers": 1}'])
def test_the_environment_turns_it_on(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv("QUEST_OPS_VLLM", variable)
    keys = configure(additional_config={}).additional_config["quest"]
    assert (keys["budget"], keys["dense_layers"]) == (256, 1)
    monkeypatch.setenv("QUEST_OPS_VLLM", "budget=200")
    refused("budget must be a multiple of the block size, 32, got 200", additional_config={})


def test_nothing_is_changed_where_it_is_not_asked_for() -> None:
    program = f"""if True:
        from vllm.config import VllmConfig
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.attention.backends.registry import AttentionBackendEnum
        config = EngineArgs(model={str(FOLDER)!r}, skip_tokenizer_init=True).create_engine_config()
        assert hasattr(VllmConfig.__post_init__, "quest_ops")  # the plugin was loaded
        assert config.additional_config == {{}} and not config.parallel_config.worker_extension_cls
        assert not any(backend.is_overridden() for backend in AttentionBackendEnum)
    """
    environment = {key: value for key, value in os.environ.items() if key != "QUEST_OPS_VLLM"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


def test_registering_again_changes_nothing() -> None:
    from vllm.config import VllmConfig

    plugin.register()
    complete = VllmConfig.__post_init__
    plugin.register()
    assert VllmConfig.__post_init__ is complete
