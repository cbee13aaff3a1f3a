"""The norm-growth limiter (APOLLO, arXiv 2412.05270, eq. 4, after Fira): an update's norm may grow
by 1 % a step at most.

Ours differs where the published code jams. There a first gradient of zero (a LoRA A-matrix, an
expert without tokens) is remembered as a norm of zero, and 1 % growth from 1e-8 takes 1,850 steps.
Here a zero norm is not remembered, and the limit never lies below a tenth of the norm of an Adam
step of this shape, so a step of Adam's size is never more than 231 steps of growth away.
"""

import math

import torch
from torch import Tensor

_FLOOR = 0.1


def limit(
    norm: Tensor, previous: Tensor, gamma: float, low_rank_size: int
) -> tuple[Tensor, Tensor]:
    """(divisor of the update, norm to remember), both of `norm`'s shape.

    `previous` is 0 where nothing is remembered yet. `low_rank_size` is the number of low-rank
    elements behind one norm: an Adam step of magnitude 1 in each of them has its root as norm.
    """
    ceiling = gamma * previous.clamp(min=_FLOOR * math.sqrt(low_rank_size))
    divisor = torch.where(previous > 0, (norm / ceiling).clamp(min=1.0), 1.0)
    return divisor, torch.where(norm > 0, norm / divisor, previous)


def limit_as_published(
    norm: Tensor, previous: Tensor, gamma: float, first: bool
) -> tuple[Tensor, Tensor]:
    """The same in the arithmetic of apollo-torch 1.0.3, which remembers zeros."""
    if first:
        return torch.ones_like(norm), norm
    divisor = (norm / (previous + 1e-8)).clamp(min=gamma) / gamma
    return divisor, norm / divisor
