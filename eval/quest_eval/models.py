"""The model that is evaluated and its tokenizer: the bundled one, SmolLM2, or any that transformers loads."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from . import bundled_model, gguf_files, library, smollm2
from .decoding import attention_function
from .errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

#: The name of the model that comes with the package.
BUNDLED = "bundled"
#: The fastest dtype of each device.
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
# Entries of a configuration that depend on how the model was stored.
_OF_FILES = ("dtype", "torch_dtype", "quantization_config", "transformers_version", "architectures")
# Stands for the prompt in a chat template, which is then split there.
_PROMPT = "<the prompt goes here>"


class Tokenizer(Protocol):
    """Text to tokens and back."""

    #: Ends an answer; None: nothing does.
    eos: int | None
    #: Whether a token is a byte, so that text may be cut anywhere.
    bytewise: bool

    @property
    def chats(self) -> bool:
        """Whether there is a chat template."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without special ones."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens, without special ones."""

    def frame(self, chat: bool) -> tuple[list[int], list[int]]:
        """Tokens before and behind a prompt: those of the chat template, or those that begin any text.

        Raises:
            InputError: ``chat`` is wanted and there is no template.
        """


class ByteTokenizer:
    eos: int | None = None
    bytewise = True
    chats = False

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode(errors="replace")

    def frame(self, chat: bool) -> tuple[list[int], list[int]]:
        if chat:
            raise InputError("the bundled model has no chat template: leave --chat away, or name another --model")
        return [], []


class TextTokenizer:
    """A tokenizer of transformers."""

    bytewise = False

    def __init__(self, tokenizer: Any, name: str) -> None:
        self._tokenizer, self._name = tokenizer, name
        self.eos: int | None = tokenizer.eos_token_id

    @property
    def chats(self) -> bool:
        return bool(self._tokenizer.chat_template)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def frame(self, chat: bool) -> tuple[list[int], list[int]]:
        if not chat:
            bos = self._tokenizer.bos_token_id
            return ([bos] if bos is not None and self._tokenizer("")["input_ids"][:1] == [bos] else []), []
        if not self.chats:
            raise InputError(f"the tokenizer of {self._name} has no chat template: leave --chat away")
        message = [{"role": "user", "content": _PROMPT}]
        text = self._tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        before, found, behind = text.partition(_PROMPT)
        if not found:
            raise InputError(f"the chat template of {self._name} changes the prompt: leave --chat away")
        return self.encode(before), self.encode(behind)


@dataclass(frozen=True)
class ModelFiles:
    """A model by its configuration and tokenizer, without its weights.

    Attributes:
        name: as on the command line.
        tokenizer: the model's.
        max_tokens: the longest sequence that it is made for; None where its configuration names none.
        where: a folder or a name on the hub, for transformers' ``from_pretrained``.
        options: more arguments of ``from_pretrained``.
    """

    name: str
    tokenizer: Tokenizer
    max_tokens: int | None
    where: str = ""
    options: dict[str, str] = field(default_factory=dict)


def find(name: str) -> ModelFiles:
    """Look at a model: its configuration, its tokenizer, and whether policies can run on it. Loads no weights.

    Args:
        name: "bundled", "smollm2", a GGUF file, a folder, or a name on the Hugging Face hub.

    Raises:
        InputError: there is no such model, or it is of a kind that is not supported.
    """
    if name == BUNDLED:
        return ModelFiles(name, ByteTokenizer(), bundled_model.MAX_TOKENS)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where, options = _source(name)
    try:
        config = AutoConfig.from_pretrained(where, **options)
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise InputError(f"--model {name} cannot be had ({reason}): give a folder or a name on the hub") from error
    text_config = config.get_text_config(decoder=True)
    if getattr(text_config, "attn_logit_softcapping", None) is not None:
        raise InputError(
            f"--model {name} cannot be evaluated (it has attn_logit_softcapping): choose one with plain attention"
        )
    if "full_attention" not in attention_function.layer_kinds(text_config):
        raise InputError(f"--model {name} cannot be evaluated (it has sliding_window): choose one with plain attention")
    try:
        with torch.device("meta"):
            attention_function.install(AutoModelForCausalLM.from_config(config))
    except ValueError as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise InputError(f"--model {name} cannot be evaluated ({reason}): choose another model") from error
    if getattr(text_config, "num_key_value_heads", None) is None:
        raise InputError(
            f"--model {name} cannot be evaluated (its configuration names no KV heads): choose another model"
        )
    max_tokens = getattr(text_config, "max_position_embeddings", None)
    return ModelFiles(name, TextTokenizer(tokenizer, name), max_tokens, where, options)


def _source(name: str) -> tuple[str, dict[str, str]]:
    """The arguments of ``from_pretrained`` for a model by its name on the command line."""
    if name == smollm2.NAME:
        return str(smollm2.find()), {}
    return gguf_files.source(Path(name)) if name.endswith(".gguf") else (name, {})


def load(files: ModelFiles, device: str, dtype: torch.dtype) -> Any:
    """The model itself, a transformers causal language model."""
    if files.name == BUNDLED:
        return bundled_model.load(device, dtype)
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(files.where, dtype=dtype, **files.options).to(device).eval()


def fingerprint(model: Any) -> str:
    """A digest of a model's configuration and weights, the same wherever and however the model is stored.

    Of each parameter about a thousand elements count, so that large models are quick. Training changes all of them.
    """
    config = {k: v for k, v in model.config.to_dict().items() if k[0] != "_" and k not in _OF_FILES}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        few = parameter.detach().flatten()[:: parameter.numel() // 1024 + 1]
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode())
        digest.update(few.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def check_device(device: str) -> None:
    """Raise InputError where ``device`` cannot be used."""
    if device == "cpu":
        return
    if library.cuda_missing:
        raise InputError(f"--device cuda is not possible: {library.cuda_missing}")
    if not torch.cuda.is_available():
        raise InputError("--device cuda is not possible: torch finds no CUDA device on this machine")
