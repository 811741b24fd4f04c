"""The table of docs/vllm.md is that of the measurement beside it."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_table_is_that_of_the_json() -> None:
    spec = importlib.util.spec_from_file_location("vllm_decode", ROOT / "bench" / "vllm_decode.py")
    assert spec is not None and spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    result = json.loads((ROOT / "bench" / "results" / "vllm-decode.json").read_text())
    assert bench.table(result["rows"]) in (ROOT / "docs" / "vllm.md").read_text()
    assert (result["budget"], result["block_size"]) == (2048, 32)
