"""Prefills of the tests go to a folder of their own, and real models are looked for where they were before."""

import pytest
from quest_eval import smollm2


@pytest.fixture(autouse=True)
def own_cache(request, monkeypatch, tmp_path_factory):
    """Tests leave nothing in the user's cache."""
    if "smollm2_folder" not in request.fixturenames:
        monkeypatch.setenv("QUEST_EVAL_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def smollm2_folder():
    if not smollm2.is_there():
        pytest.skip(f"SmolLM2 is not in {smollm2.folder()}: `make eval-model` fetches it")
    return smollm2.folder()
