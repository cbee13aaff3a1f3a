"""Inputs of layers between forward and backward: in memory, on the host, or on disk.

The engine recomputes a layer from its input, so that is all it keeps: tokens * hidden size *
layers numbers. Past a budget they go to a file; those of the last layers stay, which are needed
first.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mnemic.train.offload.io import Trace
from mnemic.train.offload.scratch import AHEAD, HostCopies, Scratch, View, storage_bytes
from mnemic.train.recipe.offload import HostOffload, SsdOffload

log = logging.getLogger("mnemic")


class LayerInputs:
    """Holds a tensor for each (layer, micro-batch). They are put layer by layer, first to last, and
    taken layer by layer, last to first, the micro-batches of a layer in their order both times.

    `host`: where those in memory lie; None leaves them where they are. `scratch`: where those go
    that would take more than `budget` bytes of memory; None for no limit. `num_layers` is needed
    with a budget. What comes back has the same bits and strides.
    """

    def __init__(
        self, *, num_layers: int = 0, budget: int = 0,
        host: HostCopies | None = None, scratch: Scratch | None = None,
    ) -> None:  # fmt: skip
        self.num_layers, self.budget, self.host, self.scratch = num_layers, budget, host, scratch
        self.held_bytes = 0
        """The most that was in memory at once."""
        self.spilled_bytes = 0
        """What has gone to the file, in total."""
        self._inputs: dict[tuple[int, int], _Kept] = {}
        self._held = self._to_come = self._micros = 0

    def put(self, layer: int, micro: int, hidden: Tensor) -> None:
        if (layer, micro) == (0, 0):
            self._begin_step()
        self._micros = max(self._micros, micro + 1)
        if layer == 0:
            # The first layer shows what each layer will take.
            self._to_come += hidden.nbytes * self.num_layers
            for key, kept in self._inputs.items():
                if not (kept.spilled or self._fits()):
                    self._inputs[key] = self._keep(self._taken(kept), spill=True)
        self._inputs[layer, micro] = self._keep(hidden, spill=not self._fits())
        self._to_come -= hidden.nbytes

    def _fits(self) -> bool:
        """Whether what is held and all that is still to come fit into the budget."""
        return self.scratch is None or self._held + self._to_come <= self.budget

    def _keep(self, hidden: Tensor, spill: bool) -> "_Kept":
        nbytes, place = hidden.nbytes, self.scratch if spill else self.host
        if spill:
            self.spilled_bytes += nbytes
        else:
            self._held += nbytes
            self.held_bytes = max(self.held_bytes, self._held)
        if place is None:
            return _Kept(hidden, nbytes)
        if hidden.untyped_storage().nbytes() > nbytes:
            # Whole storages move: a view would bring all that it is a view of.
            hidden = hidden.clone()
        return _Kept(place.put(storage_bytes(hidden)), nbytes, place, View.of(hidden), spill)

    def _begin_step(self) -> None:
        for kept in self._inputs.values():  # of a step that was not finished
            if kept.place is not None:
                kept.place.drop(kept.what)
        self._inputs.clear()
        self._held = self._to_come = self._micros = 0

    def take(self, layer: int, micro: int) -> Tensor:
        """The input; those that come next are being read meanwhile."""
        kept = self._inputs.pop((layer, micro))
        for other in (kept, *self._next(layer, micro)):
            if other.spilled and other.place is not None:
                other.place.begin(other.what)
        return self._taken(kept)

    def _taken(self, kept: "_Kept") -> Tensor:
        if not kept.spilled:
            self._held -= kept.nbytes
        if kept.place is None:
            return kept.what
        assert kept.view is not None
        return kept.view.over(kept.place.get(kept.what, kept.view.device))

    def _next(self, layer: int, micro: int) -> "Iterator[_Kept]":
        for _ in range(AHEAD):
            micro += 1
            if micro == self._micros:
                layer, micro = layer - 1, 0
            if (layer, micro) in self._inputs:
                yield self._inputs[layer, micro]

    def close(self) -> None:
        self._begin_step()
        for place in (self.host, self.scratch):
            if place is not None:
                place.close()


@dataclass(slots=True)
class _Kept:
    """An input: the tensor itself, or its ticket at a `place` and how it lay in its storage."""

    what: Any
    nbytes: int
    place: HostCopies | Scratch | None = None
    view: View | None = None
    spilled: bool = False


def layer_inputs(
    offload: HostOffload | SsdOffload, folder: Path | None, device: torch.device, *,
    num_layers: int, resident: int, trace: Trace | None = None,
) -> LayerInputs:  # fmt: skip
    """As the recipe says. `folder`: for the file, None where nothing is trained; `resident`: bytes
    of `ram_budget` that are spent already.
    """
    mode = offload.activations
    host = HostCopies(device) if device.type != "cpu" and mode != "device" else None
    if mode == "host" and host is None:
        log.warning(
            "offload.activations=host has no effect on the CPU, whose memory is the host's; set "
            "it to ssd, or leave it out"
        )
    if mode != "ssd" or folder is None:
        return LayerInputs(host=host)
    scratch = Scratch(folder, device, direct=getattr(offload, "direct", True), trace=trace)
    budget = max(0, (offload.ram_budget or 0) - resident)
    return LayerInputs(num_layers=num_layers, budget=budget, host=host, scratch=scratch)
