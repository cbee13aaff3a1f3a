"""The plan's bytes of a streamed step are the engine's own counters, to the last byte."""

import copy
from itertools import product

import pytest
import torch
from streaming import Batches, first_model, one_step, streamed_update

from mnemic.train.offload.engine import Engine, Settings, lay_out
from mnemic.train.offload.skeleton import dissect, without_weights
from mnemic.train.offload.transfer import read_model
from mnemic.train.plan.traffic import traffic

TILES = {"tile_elements": 1024, "small": 0}
CASES = {
    "adamw fp32": ("adamw", {}),
    "adamw bf16, master": ("adamw", {"dtype": torch.bfloat16}),
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


@pytest.mark.parametrize("base", ["full", "int8", "nf4"])
@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_a_frozen_base_is_read_and_never_written(name, base, tmp_path):
    first = first_model(name)
    model = without_weights(copy.deepcopy(first.config), torch.float32).requires_grad_(False)
    # In the place of an adapter: trained, so in memory.
    model.model.layers[0].input_layernorm.weight = torch.nn.Parameter(torch.ones(32))
    names = {id(p): n for n, p in model.named_parameters()}
    settings = Settings(folders=(tmp_path,), base=base, tile_elements=1024)
    layout = lay_out(dissect(model), None, settings, names)
    engine = Engine(
        layout, settings, folder=tmp_path, names=names, device=torch.device("cpu")
    )  # fmt: skip
    engine.load(read_model(first))
    objective = Batches(2)
    try:
        for step in range(1, 4):
            before = engine.io.read_bytes, engine.io.written_bytes
            batches = objective.microbatches(step)
            engine.streamer.run(batches, objective, 1.0)
        ids = torch.cat([batch.tensors["input_ids"].flatten() for batch in batches])
        found = traffic(layout, settings, ids)
        assert found.read == engine.io.read_bytes - before[0] > 0
        assert found.written == engine.io.written_bytes - before[1] == 0
    finally:
        engine.close()
