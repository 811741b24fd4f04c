"""Models in GGUF files, loaded by transformers, and their conversion to a folder that loads faster."""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from pathlib import Path
from typing import Any

from .errors import InputError

#: Packages that transformers needs to read GGUF files.
PACKAGES = ("gguf", "accelerate")


def source(path: Path) -> tuple[str, dict[str, str]]:
    """The arguments of transformers' ``from_pretrained`` for a GGUF file.

    Raises:
        InputError: there is no such file, or a package is missing.
    """
    if not path.is_file():
        raise InputError(f"--model {path} cannot be read: there is no such file")
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"--model {path} needs the package {missing[0]}: run `pip install './eval[gguf]'` in a clone")
    return str(path.parent), {"gguf_file": path.name}


def convert(path: Path, folder: Path) -> None:
    """Write a GGUF file's model in float32 and its tokenizer as a folder that transformers loads without ``gguf``.

    The folder appears whole or not at all.

    Raises:
        InputError: as :func:`source`.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where, options = source(path)
    loaded = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **options)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        whole = Path(temporary) / "model"
        _plain(loaded).save_pretrained(whole)
        AutoTokenizer.from_pretrained(where, **options).save_pretrained(whole)
        whole.rename(folder)


def _plain(loaded: Any) -> Any:
    """The same model without its quantizer: transformers refuses to save a model that was loaded from GGUF."""
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(loaded)(config).to(loaded.dtype)
    model.load_state_dict(loaded.state_dict())
    return model
