"""The bundled language model: 7.8M parameters, one token a byte, trained to find facts in long texts.

``examples/train_retrieval_model.py`` trains it; README.md beside this file has its training and measurements.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

FOLDER = Path(__file__).parent
#: The longest text that it was trained on, in tokens.
MAX_TOKENS = 32768


def load(device: torch.device | str, dtype: torch.dtype) -> Any:
    """The model as a transformers ``Qwen3ForCausalLM``, from the files that come with the package."""
    from transformers import Qwen3ForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = Qwen3ForCausalLM.from_pretrained(FOLDER, dtype=dtype, local_files_only=True)
    return model.to(device).eval()
