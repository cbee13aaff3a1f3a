"""What one forward knows of its tokens."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mnemic.models.tokens.scores import attention_mass
from mnemic.models.tokens.select import Row


@dataclass
class Forward:
    """One forward's sets. `predicting` (B, S) bool: positions with a target. `index[run]` (B, K);
    `whole`: the sequence that the run will go into; `left`: other tokens and their states, `calls`:
    layers' calls for whole sequences; `mass` (B, S): attention of supervised queries so far.
    """

    row: Row
    keep: float
    generator: torch.Generator
    predicting: Tensor
    index: dict[int, Tensor] = field(default_factory=dict)
    whole: Tensor | None = None
    left: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    calls: dict[int, dict[str, Any]] = field(default_factory=dict)
    masks: dict[tuple[int, int], Any] = field(default_factory=dict)
    mass: Tensor | None = None
    prepared: Any = None


@dataclass
class Attended:
    """Tokens chosen by what the forward has attended to, all but its first quarter, when it is
    done. `choose` makes the choice of run `number`; `counts`: whether this layer's attention does.
    """

    choose: Callable[[Forward, int], Tensor]
    forward: Forward
    number: int
    counts: bool

    @torch.no_grad()
    def attended(self, query: Tensor, key: Tensor, scaling: float, mask: Any) -> None:
        if not self.counts or self.number in self.forward.index:
            return
        found = attention_mass(query, key, scaling, self.forward.row, mask)
        self.forward.mass = found if self.forward.mass is None else self.forward.mass + found

    def selected(self) -> Tensor:
        return self.choose(self.forward, self.number)
