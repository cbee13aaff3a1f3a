"""APOLLO on a matrix whose gradient is never whole: an embedding or a head, in tiles of rows.

The scale of a channel and the limiter need norms over the whole gradient, so its tiles are made
twice: once to be projected and measured, once to change the weights. With one tile the result is
the optimizer's own, bit for bit; with several it differs in the order of sums alone.
"""

from collections.abc import Callable, Iterable
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

Tiles = Callable[[], Iterable[tuple[slice, Tensor, Tensor]]]
"""Gives (rows, weight, gradient) of each tile in order, each time it is called."""


@torch.no_grad()
def apollo_in_tiles(
    optimizer: Apollo, group: dict[str, Any], param: Tensor, name: str, tiles: Tiles
) -> None:
    """One step of the matrix `param` (m, n), of which only the shape and the state are used.

    The weights that `tiles` gives on its second call are changed in place.
    """
    state = optimizer.state[param]
    if not state:
        state |= optimizer.new_state(group, param)
    step = int(state["step"].item()) + 1
    rank, rows = rank_of(group, param), param.shape[0]
    layout = Layout(tuple(param.shape), rank, group["scale_type"])
    axes, left = layout.reduce, layout.side == "left"
    interval = (step - 1) // group["update_proj_gap"]
    key = stream_key(optimizer.seed, name, interval)

    def projection(start: int, count: int, like: Tensor) -> Projection:
        return Projection(
            group["proj"], key, rank, start, count, like.device, like.dtype,
            group["proj_entries"],
        )  # fmt: skip

    low: Tensor | None = None
    squares: Tensor | None = None
    whole: Projection | None = None
    for part, _, grad in tiles():
        found = square_sums(grad, axes)
        if left:
            partial = projection(part.start, part.stop - part.start, grad)(grad, "left")
            low = partial if low is None else low.add_(partial)
        else:
            whole = whole or projection(0, param.shape[1], grad)
            if low is None:
                low = grad.new_empty((rows, rank), dtype=found.dtype)
            low[part] = whole(grad, "right")
        if left or axes == (-2, -1):
            squares = found if squares is None else squares.add_(found)
        else:
            if squares is None:
                squares = found.new_empty((rows, 1))
            squares[part] = found
    assert low is not None and squares is not None
    item = Item(param, name, param, param, shard_of(param), state, step)
    before = square_sums(low, axes)
    factor = optimizer.factors(group, [item], layout, [low], squares[None], before[None])[0]
    keep = 1 - float(group["lr"]) * group["weight_decay"]
    if group["reference"]:
        factor *= keep
    state["step"].fill_(step)
    noise_key = stream_key(optimizer.seed, "rounding", name, step)
    for part, weight, grad in tiles():
        noise = (
            rounding_noise(noise_key, weight, part.start) if wants_noise(group, weight) else None
        )
        write(weight, grad, factor if factor.shape[0] == 1 else factor[part], keep, noise)
