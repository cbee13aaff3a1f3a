"""The plan's bytes of a streamed step are the engine's own counters, to the last byte."""

from itertools import product

import pytest
import torch
from streaming import Batches, one_step, streamed_update

from mnemic.train.plan_traffic import traffic

TILES = {"tile_elements": 1024, "small": 0}
CASES = {
    "adamw fp32": ("adamw", {}),
    "adamw bf16, master": ("adamw", {"dtype": torch.bfloat16}),
    "adamw bf16 states": ("adamw", {"dtype": torch.bfloat16, "states": "bf16"}),
    "adamw 8bit": ("adamw", {"dtype": torch.bfloat16, "states": "8bit"}),
    "apollo-mini": ("mini", {"dtype": torch.bfloat16}),
    "apollo-mini, vocabulary too": ("mini_all", {}),
}  # fmt: skip


def bytes_of_a_step(update, steps=4):
    """(read, written, ids) of the last of `steps` steps, and of spilled gradients."""
    objective = Batches(2)
    engine = update.engine
    ios = [engine.io] + ([engine._spill_store.io] if engine._spill_store else [])
    for step in range(1, steps + 1):
        before = [(io.read_bytes, io.written_bytes) for io in ios]
        one_step(update, objective, step)
    found = [
        (io.read_bytes - read, io.written_bytes - written)
        for io, (read, written) in zip(ios, before, strict=True)
    ]
    ids = torch.cat([b.tensors["input_ids"].flatten() for b in objective.microbatches(steps)])
    return found, ids


@pytest.mark.parametrize("budget", [None, 300_000, 64 << 20], ids=["least", "some", "all"])
@pytest.mark.parametrize("name", ["llama", "llama_tied"])
@pytest.mark.parametrize("case", CASES)
def test_a_step_moves_what_the_plan_says(case, name, budget, tmp_path):
    kind, settings = CASES[case]
    update = streamed_update(name, kind, tmp_path, ram_budget=budget, **TILES, **settings)
    try:
        ((read, written),), ids = bytes_of_a_step(update)
        engine = update.engine
        found = traffic(engine.layout, engine.settings, ids)
        assert (found.read, found.written) == (read, written)
        assert found.gradients_read == found.gradients_written == 0
    finally:
        update.engine.close()


@pytest.mark.parametrize(
    "clip, name, kind",
    [*product(["layer", "exact_spill"], ["llama", "llama_tied"], ["adamw", "mini_all"])],
)
def test_clipping_that_moves_more(clip, name, kind, tmp_path):
    update = streamed_update(name, kind, tmp_path, clip=clip, max_grad_norm=0.5, **TILES)
    try:
        ((read, written), *spilled), ids = bytes_of_a_step(update)
        found = traffic(update.engine.layout, update.engine.settings, ids)
        assert (found.read, found.written) == (read, written)
        gradients = (found.gradients_read, found.gradients_written)
        assert [gradients] == spilled if spilled else gradients == (0, 0)
    finally:
        update.engine.close()
