"""The verdict on a type of model: a full budget equals dense generation, or the cache is refused when it is made."""

from typing import NamedTuple

import torch
from quest_ops import QuestConfig
from quest_ops.transformers import enable_quest

from .hf_models import generate, prompt
from .tiny_models import tiny_model

#: More than the prompt and the answer, and less than the cache, so that layers are sparse and read everything.
FULL = QuestConfig(budget=112, dense_layers=0)
SMALL = QuestConfig(budget=32, sink_pages=0, dense_layers=0)
MAX_TOKENS = 200
#: Of a difference between logits, as a share of the largest one.
TOLERANCE = 1e-3

EQUAL, REFUSED, NOT_BUILT = "equal to dense", "refused", "not built"


class Verdict(NamedTuple):
    model_type: str
    result: str
    detail: str  # layers by how they decode, or the reason


def verdict(model_type):
    """The verdict on a type.

    Raises:
        AssertionError: a cache was made, and the model does not equal dense generation, or no layer reads less under a
            small budget.
    """
    try:
        model = tiny_model(model_type)
    except Exception as error:
        return Verdict(model_type, NOT_BUILT, _sentence(error))
    dense = model.config._attn_implementation
    if getattr(model.config.get_text_config(decoder=True), "attn_logit_softcapping", None):
        dense = "eager"  # in some versions of transformers the others leave out the soft-capping
    try:
        cache = enable_quest(model, FULL, max_tokens=MAX_TOKENS)
    except ValueError as error:
        return Verdict(model_type, REFUSED, _sentence(error))
    for padding in ((0,), (0, 23)):
        inputs = prompt(70, padding=padding)
        model.set_attn_implementation(dense)
        tokens, logits = generate(model, inputs, new=5)
        cache = enable_quest(model, FULL, max_tokens=MAX_TOKENS)
        got_tokens, got_logits = generate(model, inputs, cache, new=5)
        assert torch.equal(got_tokens, tokens), f"other tokens with padding of {padding}"
        off = float((got_logits - logits).abs().max() / logits.abs().max())
        assert off < TOLERANCE, f"logits are off by {off:.1e} of the largest one, with padding of {padding}"
    paths = [plan.path for plan in cache.plan()]
    _check_reads_less(model, inputs, paths)
    counts = [
        (paths.count(path), word) for path, word in (("sparse", "sparse"), ("dense", "dense"), ("none", "no keys"))
    ]
    return Verdict(model_type, EQUAL, ", ".join(f"{count} {word}" for count, word in counts if count))


def _check_reads_less(model, inputs, paths):
    cache = enable_quest(model, SMALL, max_tokens=MAX_TOKENS)
    cache.start_report()
    generate(model, inputs, cache, new=5)
    for path, layer in zip(paths, cache.report(), strict=True):
        assert (0 < layer.pages_read < layer.pages_held) == (path == "sparse"), layer


def _sentence(error):
    """An error's first two lines, in a cell of a table."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    return " ".join(lines[:2]).replace("|", "\\|")
