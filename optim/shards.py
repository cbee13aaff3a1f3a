"""Where a parameter's local data lies in the whole: FSDP2's DTensors, sharded along dimension 0."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """This rank's rows of a tensor; `group` is the process group that holds the others."""

    first_row: int = 0
    rows: int = 0
    group: Any = None
    mesh: Any = None
    placements: Any = None

    def wrap(self, local: Tensor) -> Tensor:
        """State that is sharded as the parameter is, so that checkpoints can reshard it."""
        if self.mesh is None:
            return local
        from torch.distributed.tensor import DTensor

        # Without the whole shape, torch takes all ranks to hold as many rows as this one.
        shape = torch.Size((self.rows, *local.shape[1:]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=shape, stride=stride
        )


_WHOLE = Shard()


def local(x: Tensor) -> Tensor:
    """The part of `x` that this rank holds; `x` itself where it is not a DTensor."""
    return x.to_local() if hasattr(x, "to_local") else x  # type: ignore[attr-defined]


def shard_of(param: Tensor) -> Shard:
    """How `param` is spread; ValueError for any layout but whole copies and rows."""
    placements = getattr(param, "placements", None)
    if placements is None:
        return _WHOLE
    mesh = param.device_mesh  # type: ignore[attr-defined]
    split = [i for i, place in enumerate(placements) if not place.is_replicate()]
    if not split:
        return _WHOLE
    if len(split) > 1 or not placements[split[0]].is_shard(0):
        raise ValueError(
            f"a parameter of shape {tuple(param.shape)} is placed as {placements}; "
            "APOLLO takes parameters sharded along dimension 0 by one mesh dimension (fully_shard)"
        )
    group = mesh.get_group(split[0])
    # torch.chunk's rule: all shards but the last have ceil(rows / ranks) rows.
    rows = -(-param.shape[0] // mesh.size(split[0]))
    first = min(param.shape[0], rows * mesh.get_local_rank(split[0]))
    return Shard(first, param.shape[0], group, mesh, placements)


def sum_over(group: Any, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Sums over the ranks of `group`, one message for all tensors."""
    if group is None:
        return list(tensors)
    flat = torch.cat([x.reshape(-1) for x in tensors])
    torch.distributed.all_reduce(flat, group=group)
    parts = flat.split([x.numel() for x in tensors])
    return [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]
