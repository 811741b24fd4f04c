"""The host's account of steps: which layers have written the tokens of each sequence.

A layer left out of a step leaves slots that were never written. They may still hold the keys of another sequence.
"""

from __future__ import annotations


class LayerSteps:
    """Notes the layers that wrote each step, and the first token that a layer left out lacks.

    Args:
        num_layers: L.

    Attributes:
        open: whether a step has begun and nothing has changed the sequences since.
        num_new: T of the last step.
        unseen: whether compiled or captured code writes layers. The host does not see its steps, so none is checked.
    """

    def __init__(self, num_layers: int) -> None:
        self.num_layers, self.open, self.num_new, self.unseen = num_layers, False, 0, False
        self._waiting: set[int] = set()  # layers that have not written the open step
        self._starts: list[int] = []
        self._counts: list[int] = []
        self._lacking: dict[int, dict[int, int]] = {}  # layer -> sequence -> first token that was not written

    def begin(self, num_new: int, starts: list[int], counts: list[int]) -> None:
        """Begin a step of ``num_new`` tokens: of ``counts`` [B] real ones after ``starts`` [B] tokens."""
        self.end()
        self.open, self.num_new, self._starts, self._counts = True, num_new, starts, counts
        self._waiting = set(range(self.num_layers))

    def end(self) -> None:
        """End the step, and note the layers that were left out of it."""
        if self.open and not self.unseen:
            for layer in self._waiting:
                lacking = self._lacking.setdefault(layer, {})
                for sequence, count in enumerate(self._counts):
                    if count:
                        lacking.setdefault(sequence, self._starts[sequence])
        self.open = False

    def expects(self, layer: int) -> bool:
        """Whether the layer has an open step to write."""
        return self.open and layer in self._waiting

    def first_lacking(self, layer: int) -> tuple[int, int] | None:
        """A sequence of this step and its first token that the layer has not written; None: it has written all."""
        for sequence, token in self._lacking.get(layer, {}).items():
            if self._counts[sequence]:
                return sequence, token
        return None

    def wrote(self, layer: int) -> None:
        """Note that the layer has written the step."""
        self._waiting.discard(layer)

    def keep(self, sequence: int, tokens: int) -> None:
        """Forget the sequence's tokens past the first ``tokens``."""
        for lacking in self._lacking.values():
            if lacking.get(sequence, -1) >= tokens:
                del lacking[sequence]

    def fork(self, source: int, target: int) -> None:
        """Let ``target`` lack the tokens that ``source`` lacks."""
        self.keep(target, 0)
        for lacking in self._lacking.values():
            if source in lacking:
                lacking[target] = lacking[source]
