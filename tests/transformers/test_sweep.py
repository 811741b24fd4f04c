"""Every type of causal language model that transformers has equals dense generation, or is refused by enable_quest."""

import pytest

transformers = pytest.importorskip("transformers", minversion="5.0")

from helpers.support_table import PAGE, page, read
from helpers.sweep import NOT_BUILT, verdict
from helpers.tiny_models import CAUSAL_LM_TYPES


@pytest.mark.parametrize("model_type", CAUSAL_LM_TYPES)
def test_a_model_equals_dense_or_is_refused_as_the_page_says(model_type):
    found = verdict(model_type)
    committed, version = read()
    if version == transformers.__version__:
        assert found == committed[model_type]
    elif found.result == NOT_BUILT:
        pytest.skip(found.detail)


def test_the_page_is_written_from_its_rows():
    committed, version = read()
    rows = sorted(committed.values())
    assert page(rows, version) == PAGE.read_text()
    if version == transformers.__version__:
        assert [row.model_type for row in rows] == CAUSAL_LM_TYPES
