"""Messages to the user through the logger ``quest_ops``, each once a process."""

from __future__ import annotations

import logging

logger = logging.getLogger("quest_ops")

_said: set[str] = set()


def say_once(message: str, level: int = logging.WARNING) -> None:
    """Log ``message`` unless it was logged before."""
    if message not in _said:
        _said.add(message)
        logger.log(level, message)
