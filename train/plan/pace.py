"""How long a step of a recipe takes beside another's: a coarse estimate, made to order choices.

Matrix products at a speed measured here, each technique's recomputation as a share of a forward,
and what moves at the speed of the disk; a step takes the longer of computing and moving.
"""

import math
import time
from dataclasses import dataclass
from typing import Any

from mnemic.train.plan.ways import Way
from mnemic.train.recipe.model import NoAdapters
from mnemic.train.recipe.recipe import Recipe
from mnemic.train.recipe.training import StreamedUpdate

EFFICIENCY = 0.5
"""Share of a large matrix product's speed that a training step comes to."""
HOST = 8e9
"""Bytes a second between a streamed model's host memory and where it computes."""
TILES, CHUNKS, LOGITS = 0.6, 0.15, 0.06
"""Shares of a forward: MLPs again in tiles; sequence chunks past recomputing; the head again."""
HALVING, MOVED, DECODED, REDONE = 1.02, 1.02, 1.05, 1.5
"""Factors: half the rows at once; activations written and read; a base decoded from 8 or 4 bits;
every second speculative step
taken back and done again, as it is while norms are above the limit."""


@dataclass(frozen=True)
class Speeds:
    """Of this machine: operations and bytes a second."""

    flops: float
    read: float
    write: float


def measure_flops(device: Any, recipe: Recipe) -> float:
    """Of a product of two matrices of 768 x 768, in the type that the recipe computes in; some
    hundredths of a second.
    """
    import torch

    short = "bf16" in (recipe.loop.precision, recipe.model.dtype)
    dtype = torch.bfloat16 if short else torch.float32
    one = torch.ones(768, 768, dtype=dtype, device=device)
    best = math.inf
    for _ in range(3):
        began = time.perf_counter()
        (one @ one)[0, 0].item()
        best = min(best, time.perf_counter() - began)
    return 2 * 768**3 / best


def step_seconds(
    recipe: Recipe, speeds: Speeds, *, parameters: int, tokens: int, weights: int, way: Way | None
) -> float:
    """`tokens`: of a step; `weights`: their bytes; `way`: what was counted, None for the least that
    it could be.
    """
    loop, streamed = recipe.loop, isinstance(recipe.update, StreamedUpdate)
    forward = 2.0 * parameters * tokens / (speeds.flops * EFFICIENCY)
    passes = 3.0 if isinstance(recipe.adapters, NoAdapters) else 2.0
    if streamed or loop.sequence_chunk:
        passes += 1 + (CHUNKS if loop.sequence_chunk else 0)
    elif loop.gradient_checkpointing:
        passes += 1 / loop.checkpoint_every
    passes += TILES if loop.mlp_tile != "none" else 0
    passes += LOGITS if loop.loss == "chunked" and not streamed else 0
    halvings = math.log2(loop.batch_size / (loop.micro_batch_size or loop.batch_size))
    computing = forward * passes * HALVING ** max(0.0, halvings)
    computing *= MOVED if recipe.offload.activations != "device" else 1.0
    computing *= DECODED if getattr(recipe.offload, "base", "full") != "full" else 1.0
    moving = 0.0
    if streamed and recipe.offload.kind == "host":
        moving = 3 * weights / HOST
    if way is not None and way.read + way.written:
        if not (speeds.read and speeds.write):
            return math.inf  # the disk could not be written
        moving += way.read / speeds.read + way.written / speeds.write
    redone = getattr(recipe.update, "clip", "") == "speculative"
    return max(computing, moving) * (REDONE if redone else 1.0)
