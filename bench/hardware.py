"""The hardware and versions that a JSON of figures names."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import quest_ops
import torch


def machine(device: str) -> dict[str, Any]:
    """Hardware and versions."""
    found = {"torch": torch.__version__, "quest_ops": quest_ops.__version__, "python": platform.python_version()}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        return {"gpu": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda, **found}
    return {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads(), **found}


def default_path(name: str, device: str) -> Path:
    """Where a script writes: bench/results/NAME-h100.json, or on the CPU a folder that git ignores."""
    if device == "cpu":
        return Path(f"results/{name}-cpu.json")
    words = torch.cuda.get_device_properties(0).name.lower().split()
    gpu = next((word for word in words if any(letter.isdigit() for letter in word)), "gpu")
    return Path(f"bench/results/{name}-{gpu}.json")
