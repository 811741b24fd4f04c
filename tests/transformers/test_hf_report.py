"""The report of a model's layers after generation, against counts by hand."""

from dataclasses import replace

import pytest

pytest.importorskip("transformers", minversion="5.0")

from helpers import hf_models
from helpers.hf_models import compiled
from quest_ops import QuestConfig
from quest_ops.bounds import BoundsKind
from quest_ops.transformers import enable_quest

S, PROMPT, NEW = 16, 50, 12
CONFIG = QuestConfig(32, S, sink_pages=0, dense_layers=1)


@pytest.mark.parametrize("compile_it", [False, True])
@pytest.mark.parametrize("kind", ["cache", "int8", "int4"])
def test_counts(device: str, compile_it: bool, kind: BoundsKind) -> None:
    model = hf_models.make_model("qwen3", device)
    cache = enable_quest(model, replace(CONFIG, bounds=kind), max_tokens=128)
    with pytest.raises(RuntimeError, match="call cache.start_report"):
        cache.report()
    cache.start_report()
    options = compiled("eager", device) if compile_it else {}
    hf_models.generate(model, hf_models.prompt(PROMPT, device, padding=(0, 10)), cache, new=NEW, **options)
    held = sum(-(-(PROMPT - padding + i) // S) for i in range(1, NEW) for padding in (0, 10))
    heads, head_dim = hf_models.COMMON["num_key_value_heads"], hf_models.COMMON["head_dim"]
    page = 2 * S * head_dim * 4
    bounds = {"cache": 2 * head_dim * 4, "int8": 2 * head_dim + 4, "int4": head_dim + 4}[kind]
    dense, *sparse = cache.report()
    assert (dense.plan.path, dense.prefills, dense.steps) == ("dense", 1, NEW - 1)
    assert dense.pages_read == dense.pages_held == held * heads
    for layer in sparse:
        assert (layer.plan.path, layer.prefills, layer.steps) == ("sparse", 1, NEW - 1)
        assert (layer.pages_read, layer.pages_held) == (2 * (NEW - 1) * 2 * heads, held * heads)
        assert layer.bytes_read == layer.pages_read * page + held * heads * bounds
    assert str(cache.report()).splitlines()[2].split()[:4] == ["1", "sparse", "1", str(NEW - 1)]
    cache.stop_report()


def test_sliding_layers_have_steps_alone(device: str) -> None:
    model = hf_models.make_model("gemma3", device)
    cache = enable_quest(model, CONFIG, max_tokens=128, batch_size=1)
    cache.start_report()
    hf_models.generate(model, hf_models.prompt(PROMPT, device), cache, new=4)
    sliding, *full = cache.report()
    assert (sliding.plan.path, sliding.prefills, sliding.steps, sliding.pages_held) == ("dense", 1, 3, 0)
    assert sliding.plan.reason == f"sliding window of {hf_models.WINDOW} tokens"
    assert all(layer.steps == 3 and layer.pages_held > layer.pages_read > 0 for layer in full)
