"""Real engines of vLLM, in this process, one at a time."""

import contextlib
import gc
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# The engine runs in the test's process, so that a test can look at its tensors. One thread: two that are bound to cores
# wait for each other where tests run beside.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.pop("QUEST_OPS_VLLM", None)

#: Text for prompts: the tokens of the bundled model are bytes.
TEXT = Path(random.__file__).read_bytes()


def prompt(start: int, tokens: int) -> list[int]:
    return list(TEXT[start : start + tokens])


@contextlib.contextmanager
def run_engine(quest: dict[str, Any] | None = None, **settings: Any) -> Iterator[Any]:
    """An engine with the bundled model, unless ``model`` says otherwise; ``quest`` None is vLLM as it is."""
    from quest_eval.bundled_model import FOLDER
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.platforms import current_platform

    defaults = {"model": str(FOLDER), "dtype": "float32", "max_model_len": 4096, "block_size": 32}
    quiet = {"skip_tokenizer_init": True, "enforce_eager": True, "kv_cache_memory_bytes": 2**28}
    additional = {} if quest is None else {"quest": quest}
    llm = LLM(**{**defaults, **quiet, **settings}, additional_config=additional)
    # Once is enough for a process. A second time it looks into modules that came since, and fails on one of numba's.
    type(current_platform).register_triton_kernel_overrides = staticmethod(lambda: None)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def generate(llm: Any, prompts: list[list[int]], tokens: int | list[int] = 16) -> list[list[int]]:
    """Greedy tokens of each prompt, all given at once."""
    from vllm import SamplingParams

    counts = tokens if isinstance(tokens, list) else [tokens] * len(prompts)
    params = [SamplingParams(max_tokens=n, temperature=0, detokenize=False, ignore_eos=True) for n in counts]
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def log_probabilities(llm: Any, prompts: list[list[int]], tokens: int = 16) -> list[list[dict[int, float]]]:
    """Of the five likeliest tokens at each step of greedy decoding."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=tokens, temperature=0, detokenize=False, ignore_eos=True, logprobs=5)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return [[{t: x.logprob for t, x in step.items()} for step in output.outputs[0].logprobs] for output in outputs]
