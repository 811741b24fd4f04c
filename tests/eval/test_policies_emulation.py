"""The bundled model: the facts it finds under each policy, and the kernels against the emulation."""

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")

from quest_eval import bundled_model
from quest_eval.decoding.policy_decoder import PolicyDecoder
from quest_eval.policies import make
from quest_eval.policies.emulation import QuestEmulation
from quest_eval.tasks.facts import KEY_DIGITS, hide_facts
from quest_eval.tasks.text import standard_library_text


@pytest.fixture(scope="module")
def facts(device):
    """A decoder behind two texts of the same length with facts in them, and the facts of both."""
    haystacks = []
    for seed in range(100):
        haystack = hide_facts(standard_library_text(1500), 1500, 2, seed)
        if {len(fact.name) for fact in haystack.facts} == {6}:
            haystacks.append(haystack)
    haystacks = haystacks[:2]
    decoder = PolicyDecoder(bundled_model.load(device, torch.float32), max_tokens=1600, batch_size=2)
    decoder.prefill(torch.tensor([list(haystack.text) for haystack in haystacks]), policies=[])
    return decoder, [haystack.facts for haystack in haystacks]


def ask(decoder, facts, policy, which):
    ids = torch.tensor([list(of_text[which].question) for of_text in facts])
    return [bytes(row).decode(errors="replace") for row in decoder.generate(policy, ids, KEY_DIGITS).tolist()]


@pytest.mark.parametrize("which", [0, 1])
def test_facts_are_found_by_dense_attention_and_quest_and_out_of_reach_of_a_window(facts, which):
    keys = [of_text[which].key for of_text in facts[1]]
    assert ask(*facts, make("dense", None), which) == keys
    assert ask(*facts, make("quest", 256), which) == keys
    assert not set(ask(*facts, make("streaming", 64), which)) & set(keys)


@pytest.mark.parametrize("how", ["none", "max", "sum", "soft"])
@pytest.mark.parametrize("budget", [64, 256])
def test_the_kernels_do_what_the_emulation_does(facts, how, budget):
    """Same pages, but for pages whose scores are the same to float32, and same answers."""
    decoder, of_texts = facts
    name = {"none": "quest-head", "max": "quest"}.get(how, f"quest-{how}")
    real, emulated = make(name, budget), QuestEmulation("emulation", budget, group_reduce=how)
    compared = []

    def compare(layer, info):
        if info.pages is None:
            return
        # The emulation's choice for the same query and keys.
        mine = emulated.start(info.kv)
        mine.attend(info.q)
        P = -(-info.length // 16)
        lists = [
            torch.zeros(*pages.shape[:2], P, dtype=torch.bool, device=pages.device).scatter_(-1, pages.long(), True)
            for pages in (info.pages, mine.pages)
        ]
        scores = mine.scores
        differs = lists[0] != lists[1]
        edge = scores.masked_fill(~lists[1], torch.inf).amin(-1, keepdim=True)  # the worst page that it chose
        tolerance = 1e-5 * scores.abs().amax(-1, keepdim=True)
        assert ((scores - edge).abs() <= tolerance)[differs].all()
        compared.append(float(differs.sum(-1).float().mean()))

    decoder.observer = compare
    try:
        for which in (0, 1):
            compared.clear()
            answers = ask(decoder, of_texts, real, which)
            assert len(compared) == 4 * (len(of_texts[0][which].question) + KEY_DIGITS - 1)
            assert sum(compared) / len(compared) < 0.05, "ties are rare"
            decoder.observer = None
            assert ask(decoder, of_texts, emulated, which) == answers
            decoder.observer = compare
    finally:
        decoder.observer = None
