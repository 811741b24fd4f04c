"""Asks a vLLM server for completions, by the OpenAI-compatible interface.

    QUEST_OPS_VLLM=budget=1024 vllm serve MODEL --block-size 32 --max-model-len 8192
    python examples/vllm_client.py [--url URL] [--file FILE] [--question QUESTION]

The prompt is the start of a file, with a question at its end. Nothing in a request says that the server decodes
sparsely: the server's log does.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--file", type=Path, default=Path(random.__file__), help="text to ask about")
    parser.add_argument("--characters", type=int, default=12_000, help="of the file, from its start")
    parser.add_argument("--question", default="\n\nIn one sentence, what is the text above for?\n")
    parser.add_argument("--tokens", type=int, default=48)
    arguments = parser.parse_args()
    client = OpenAI(base_url=arguments.url, api_key="none")
    model = client.models.list().data[0].id
    prompt = arguments.file.read_text()[: arguments.characters] + arguments.question
    stream = client.completions.create(
        model=model, prompt=prompt, max_tokens=arguments.tokens, temperature=0, stream=True
    )
    print(f"{model}:", flush=True)
    for part in stream:
        print(part.choices[0].text, end="", flush=True)
    print()


if __name__ == "__main__":
    main()
