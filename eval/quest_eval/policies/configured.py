"""Quest as a QuestConfig has it, which may give each layer a budget of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from quest_ops import QuestConfig

from .base import Policy
from .quest import Quest

if TYPE_CHECKING:
    from .base import LayerKV, LayerReader


@dataclass(frozen=True)
class Configured(Policy):
    """Quest by a configuration, given as such or in a file.

    Args:
        file: of :meth:`quest_ops.QuestConfig.save`; not read where there is a ``config``.
        config: outranks ``page_size`` and ``dense_layers``.

    Raises:
        ValueError: a file that is missing or cannot be read.
    """

    has_budget: ClassVar[bool] = False

    file: str = ""
    config: QuestConfig | None = None

    def __post_init__(self) -> None:
        config = self.config
        if config is None:
            if not self.file:
                raise ValueError(f"policy {self.name} needs a file, as in {self.name},file=config.json")
            try:
                config = QuestConfig.load(self.file)
            except OSError as error:
                raise ValueError(f"file {self.file} cannot be read: {error.strerror}") from error
        # Frozen dataclasses are set in this way alone.
        for name, value in (("config", config), ("page_size", config.page_size), ("dense_layers", 0)):
            object.__setattr__(self, name, value)

    def label(self) -> str:
        return f"Quest, {Path(self.file).name or 'a budget for each layer'}"

    def at(self, layer: int) -> Quest:
        assert self.config is not None
        config = self.config.at(layer)
        assert isinstance(config.budget, int)
        return Quest(
            self.name,
            config.budget,
            config.page_size,
            0,
            config.group_reduce,
            config.sink_pages,
            config.recent_pages,
            bounds=config.bounds,
            std_factor=config.std_factor,
            dense_below=config.dense_below,
            candidates=config.candidates,
            reselect_every=config.reselect_every,
        )

    def is_dense(self, layer: int) -> bool:
        assert self.config is not None
        return self.config.is_dense(layer)

    def check_num_layers(self, num_layers: int) -> None:
        assert self.config is not None
        self.config.check_num_layers(num_layers)

    def start(self, kv: LayerKV) -> LayerReader:
        raise NotImplementedError("each layer starts its own policy: at(layer).start(kv)")
