"""The folder of what is expensive to make again: converted models and prefills."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$QUEST_EVAL_CACHE``, or ``~/.cache/quest_ops`` where that is not set."""
    named = os.environ.get("QUEST_EVAL_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "quest_ops"
