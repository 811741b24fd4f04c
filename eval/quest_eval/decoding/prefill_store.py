"""Prefills on disk: the keys, values and notes of a context that a model has read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

# The age in seconds from which an unfinished file belongs to a process that has died.
_ABANDONED = 3600


class PrefillStore:
    """A folder of prefills, of which the least recently used are deleted once they are too large together.

    Args:
        folder: is made where it is not there.
        most_bytes: of all files together. A prefill that is larger alone is not kept.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self._folder, self._most_bytes = folder, most_bytes

    def load(self, key: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """The tensors and notes that were saved under this key; None where there are none, or none that are whole."""
        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as file:
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
                notes = file.metadata() or {}
            os.utime(path)  # the age that decides which are deleted
        except (OSError, SafetensorError):
            return None
        return found, notes

    def save(self, key: Mapping[str, Any], tensors: dict[str, Tensor], notes: dict[str, str]) -> None:
        """Save tensors under a key. Readers see the whole file or none. A full disk is no error: nothing is kept."""
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        if size > self._most_bytes:
            return
        unfinished = None
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._make_room(size)
            handle, unfinished = tempfile.mkstemp(".unfinished", dir=self._folder)
            os.close(handle)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, unfinished, notes)
            Path(unfinished).replace(self._path(key))
        except (OSError, SafetensorError):
            if unfinished is not None:
                Path(unfinished).unlink(missing_ok=True)

    def _path(self, key: Mapping[str, Any]) -> Path:
        return self._folder / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()}.safetensors"

    def _make_room(self, size: int) -> None:
        for path in self._folder.glob("*.unfinished"):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > _ABANDONED:
                    path.unlink()
        files = []
        for path in self._folder.glob("*.safetensors"):
            with contextlib.suppress(OSError):  # another process may have deleted it
                files.append((path.stat().st_mtime, path.stat().st_size, path))
        used = sum(length for _, length, _ in files)
        for _, length, path in sorted(files):
            if used + size <= self._most_bytes:
                break
            path.unlink(missing_ok=True)
            used -= length
