"""Checks of arguments that commands share. Each raises an InputError."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import policies
from ..cache_folder import cache_folder
from ..decoding.prefill_store import PrefillStore
from ..errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ..models import ModelFiles


def make_policies(
    names: Sequence[str], budgets: Sequence[int], page_size: int, dense_layers: int
) -> list[policies.Policy]:
    """Each policy at each budget, those without one once."""
    for budget in budgets:
        if budget < 2 * page_size or budget % page_size:
            raise InputError(
                f"--budgets must be multiples of the page size, {page_size}, from {2 * page_size} on, got {budget}"
            )
    try:
        made = [
            policies.make(name, budget, page_size=page_size, dense_layers=dense_layers)
            for name in names
            for budget in budgets
        ]
    except ValueError as error:
        raise InputError(f"--policies and --budgets: {error}") from error
    for policy in made:
        if policy.budget is not None and policy.budget % policy.page_size:
            raise InputError(
                f"--budgets must be multiples of the page size, {policy.page_size} of {policy.name}, "
                f"got {policy.budget}"
            )
    if not made:
        raise InputError("--policies and --budgets must name at least one each")
    return list(dict.fromkeys(made))


def check_lengths(lengths: Sequence[int], files: ModelFiles) -> None:
    if files.max_tokens is not None and max(lengths) > files.max_tokens:
        raise InputError(f"--lengths must be at most {files.max_tokens}, which the model knows, got {max(lengths)}")


def make_store(gibibytes: float | None, device: str) -> PrefillStore | None:
    """The store of prefills. By default it has room for 8 GiB on a CPU, and on a GPU, which prefills fast, none."""
    if gibibytes is None:
        gibibytes = 8 if device == "cpu" else 0
    if gibibytes < 0:
        raise InputError(f"--prefills must be at least 0, got {gibibytes}")
    return PrefillStore(cache_folder() / "prefills", int(gibibytes * 2**30)) if gibibytes else None


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {folder} cannot be made: {error.strerror}") from error
