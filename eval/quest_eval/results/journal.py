"""The journal of a run: each finished batch is a line of a file, so that an interrupted run resumes."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

from ..errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    from ..policies import Policy


class Journal:
    """A JSONL file: the settings of the run, then a record for each batch and policy that is finished.

    Raises:
        InputError: the file is of a run with other settings, or cannot be written.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.records: list[dict[str, Any]] = []
        self._path = path
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        if lines and not lines[-1].endswith("\n"):
            lines.pop()  # the run was interrupted while it wrote this line
        if lines:
            first, *rest = map(json.loads, lines)
            other = [name for name in settings if first.get(name) != settings[name]]
            if other:
                raise InputError(
                    f"{path} is of a run with another {other[0]} ({first.get(other[0])}, now {settings[other[0]]}): "
                    "choose another --out, or delete the file to begin anew"
                )
            self.records = rest
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(lines))
        except OSError as error:
            raise InputError(f"--out {path.parent} cannot be written: {error.strerror}") from error
        if not lines:
            self._write(settings)

    def done(self, task: str, length: int, policy: Policy) -> set[int]:
        """The samples that are finished."""
        cell = (task, length, policy.name, policy.budget)
        return {
            sample["index"]
            for record in self.records
            if cell == (record["task"], record["length"], record["policy"], record["budget"])
            for sample in record["samples"]
        }

    def add(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        self._write(record)

    def _write(self, line: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
