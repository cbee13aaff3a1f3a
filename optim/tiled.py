"""APOLLO on a matrix whose gradient is never whole: an embedding or a head, in tiles of rows.

The scale of a channel and the limiter need norms over the whole gradient, so its tiles are seen
twice: once to be projected and measured, once to change the weights. With one tile the result is
the optimizer's own, bit for bit; with several it differs in the order of sums alone.
"""

from typing import Any

import torch
from torch import Tensor

from mnemic.optim.apollo import Apollo, Item
from mnemic.optim.lowrank import Layout, square_sums
from mnemic.optim.projection import Projection
from mnemic.optim.random import stream_key
from mnemic.optim.rules import rank_of, wants_noise
from mnemic.optim.shards import shard_of
from mnemic.optim.write import rounding_noise, write


class TiledStep:
    """One step of the matrix `param` (m, n), of which only the shape and the state are used:
    `measure` each tile's gradient in order, then `apply` each. A tile that is not measured has a
    gradient of zero, and need not be applied where weights do not decay.
    """

    def __init__(self, optimizer: Apollo, group: dict[str, Any], param: Tensor, name: str) -> None:
        self.optimizer, self.group, self.param, self.name = optimizer, group, param, name
        self.state = optimizer.state[param]
        if not self.state:
            self.state |= optimizer.new_state(group, param)
        self.step = int(self.state["step"].item()) + 1
        self.layout = Layout(tuple(param.shape), rank_of(group, param), group["scale_type"])
        self.keep = 1 - float(group["lr"]) * group["weight_decay"]
        interval = (self.step - 1) // group["update_proj_gap"]
        self._key = stream_key(optimizer.seed, name, interval)
        self._low: Tensor | None = None
        self._squares: Tensor | None = None
        self._columns: Projection | None = None
        self._factor: Tensor | None = None
        self._noise_key = stream_key(optimizer.seed, "rounding", name, self.step)

    def _projection(self, start: int, count: int, like: Tensor) -> Projection:
        group = self.group
        return Projection(
            group["proj"], self._key, self.layout.rank, start, count, like.device, like.dtype,
            group["proj_entries"],
        )  # fmt: skip

    @torch.no_grad()
    def measure(self, rows: slice, grad: Tensor) -> None:
        found = square_sums(grad, self.layout.reduce)
        exact, height = found.dtype, self.param.shape[0]
        if self.layout.side == "left":
            part = self._projection(rows.start, rows.stop - rows.start, grad)(grad, "left")
            self._low = part if self._low is None else self._low.add_(part)
        else:
            self._columns = self._columns or self._projection(0, self.param.shape[1], grad)
            if self._low is None:
                self._low = grad.new_zeros((height, self.layout.rank), dtype=exact)
            self._low[rows] = self._columns(grad, "right")
        if self.layout.reduce == (-1,):
            if self._squares is None:
                self._squares = found.new_zeros((height, 1))
            self._squares[rows] = found
        else:
            self._squares = found if self._squares is None else self._squares.add_(found)

    @torch.no_grad()
    def finish(self) -> None:
        """Moments and factors, once every tile is measured."""
        if self._low is None or self._squares is None:
            return
        item = Item(
            self.param, self.name, self.param, self.param, shard_of(self.param), self.state,
            self.step,
        )  # fmt: skip
        before = square_sums(self._low, self.layout.reduce)
        self._factor = self.optimizer.factors(
            self.group, [item], self.layout, [self._low], self._squares[None], before[None]
        )[0]
        if self.group["reference"]:
            self._factor *= self.keep
        self.state["step"].fill_(self.step)
        self._low = self._squares = None

    @torch.no_grad()
    def apply(self, rows: slice, weight: Tensor, grad: Tensor) -> None:
        """Change `weight`, the tile's rows, in place."""
        if self._factor is None:
            return
        noise = None
        if wants_noise(self.group, weight):
            noise = rounding_noise(self._noise_key, weight, rows.start)
        factor = self._factor if self._factor.shape[0] == 1 else self._factor[rows]
        write(weight, grad, factor, self.keep, noise)
