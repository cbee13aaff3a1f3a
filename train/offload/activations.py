"""Inputs of layers between forward and backward: in memory, on the host, or on disk.

The engine recomputes a layer from its input, so that is all it keeps: tokens * hidden size *
layers numbers.
"""

from torch import Tensor


class LayerInputs:
    """Holds a tensor for each (layer, micro-batch)."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, int], Tensor] = {}

    def put(self, layer: int, micro: int, hidden: Tensor) -> None:
        self._held[layer, micro] = hidden

    def take(self, layer: int, micro: int) -> Tensor:
        return self._held.pop((layer, micro))
