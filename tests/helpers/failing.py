"""A failure at any operation of PyTorch."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class FailingAt(TorchDispatchMode):
    """Raises at operation number ``n``: in place of it, or, as an interrupt does, once it is done."""

    def __init__(self, n: int, error: BaseException, done: bool) -> None:
        super().__init__()
        self.n, self.error, self.done, self.calls = n, error, done, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        if self.calls == self.n and not self.done:
            raise self.error
        result = func(*args, **(kwargs or {}))
        if self.calls == self.n:
            raise self.error
        return result
