"""Memory, disk and traffic of a streamed model: the engine's own layout, and one layer at work."""

from typing import TYPE_CHECKING

from mnemic.train.offload.build import Streamed, streamed
from mnemic.train.offload.engine import Layout
from mnemic.train.offload.memory import round_up
from mnemic.train.offload.skeleton import dissect
from mnemic.train.offload.spill import gradient_pieces
from mnemic.train.plan.guess import guessed_layer
from mnemic.train.plan.layer import Layer, head_bytes, layer
from mnemic.train.plan.shapes import Shape, Shapes
from mnemic.train.plan.sizes import gradient_bytes, quiet, state_bytes
from mnemic.train.plan.techniques import kept_count
from mnemic.train.plan.traffic import spread_ids, traffic
from mnemic.train.recipe.offload import NoOffload
from mnemic.train.recipe.recipe import Recipe

if TYPE_CHECKING:
    from mnemic.train.plan.ways import Planner, Way

_ON_DEVICE = (
    "layers", "vocabulary tiles", "state tiles", "small states", "rest", "gradient slots",
)  # fmt: skip
"""Parts of `Layout.resident` that have a second buffer on an accelerator."""


def laid_out(planner: "Planner", recipe: Recipe) -> Streamed:
    """The engine's layout, made once for recipes that differ in nothing it depends on."""
    parts = (recipe.model, recipe.adapters, recipe.optimizer, recipe.update)
    rest = recipe.offload.model_dump(exclude={"activations", "path", "trace"})
    key = repr((*parts, rest, recipe.loop.sequence_chunk, recipe.loop.mlp_tile))
    if key not in planner.layouts:
        with quiet():
            planner.layouts[key] = streamed(recipe, planner.tokenizer, planner.device)
    return planner.layouts[key]


def fill_streamed(planner: "Planner", way: "Way", recipe: Recipe, shapes: Shapes) -> None:
    """Put the figures of `recipe` into `way`."""
    plan = laid_out(planner, recipe)
    layout, offload = plan.layout, recipe.offload
    assert not isinstance(offload, NoOffload)
    apart = planner.device.type != "cpu"
    resident = layout.resident()
    inputs, moments = _work(planner, recipe, layout, shapes)
    kept = inputs
    if offload.activations == "ssd":
        kept = min(inputs, max(0, (offload.ram_budget or 0) - sum(resident.values())))
    waiting = {name: kept if name in ("backward", "head") else 0 for name in moments}
    way.peak = max(moments, key=lambda name: moments[name][1] + waiting[name])
    gradients, work = moments[way.peak]
    working = {
        "gradients": gradients, "layer inputs": waiting[way.peak],
        "activations": work - gradients,
    }  # fmt: skip
    adapters = {}
    if not plan.full:
        adapters = {
            "adapters": gradient_bytes(plan.model),
            "gradients": gradient_bytes(plan.model),
            "optimizer state": state_bytes(recipe, plan.model),
        }
    way.host = {"imports": planner.base, "data": shapes.data_bytes, **resident}
    if plan.settings.clip == "exact_spill":
        # Two slots for blocks and three for tiles (spill.py).
        resident["gradient slots"] = 2 * max(layout.block_bytes) + 3 * layout.tile_bytes
        way.host["gradient slots"] = resident["gradient slots"]
    if offload.kind == "host":
        way.host["weights and states"] = store_bytes(layout)
    if apart:
        twice = {name: resident[name] for name in _ON_DEVICE if name in resident}
        way.device = twice | working | adapters
        if offload.activations != "device":
            way.host["layer inputs"] = way.device.pop("layer inputs")
    else:
        way.host |= {**working, **adapters, "kernels": planner.kernels(recipe)}
    _count_disk(planner, way, recipe, plan, shapes, inputs - kept)


def _work(
    planner: "Planner", recipe: Recipe, layout: Layout, shapes: Shapes
) -> tuple[int, dict[str, tuple[int, int]]]:
    """Bytes of layer inputs, and of each moment of a step (gradients, all that is at work)."""
    model = planner.model
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    planner.checkpointing(None)
    anatomy = dissect(inner)
    largest = max(range(len(layout.blocks)), key=lambda i: layout.block_bytes[i])
    weights = layout.block_bytes[largest] if layout.applier else 0

    def run(shape: Shape) -> Layer:
        kept = kept_count(recipe, shape)
        return planner.layer(
            (largest, shape, kept),
            lambda: layer(planner.fake, anatomy, largest, shape, kept),
            lambda: guessed_layer(model, weights, shape),
        )

    found = run(shapes.largest)
    each_token = found.input // shapes.largest.tokens
    tokens = sum(shape.tokens for shape in shapes.step)
    inputs = each_token * tokens * len(layout.blocks)
    embedding = layout.matrices[0]
    width = embedding.tiling.cols * embedding.param.dtype.itemsize
    rows = min(embedding.tiling.rows, tokens) * width * (3 if layout.applier else 2)
    fronts = found.front * len(shapes.step) + rows
    # Hidden states, and their gradients, flow through the layers for all micro-batches at once.
    flowing = 2 * each_token * tokens
    step = planner.step_bytes(recipe) if layout.applier else 0
    tile = layout.matrices[-1].tiling.step
    head = head_bytes(anatomy, tile, shapes.largest.head_tokens)
    others = sum(s.head_tokens for s in shapes.step) - shapes.largest.head_tokens
    head += max(0, others) * width
    moments = {
        "backward": (found.gradient, found.backward + step + fronts + flowing),
        "head": (0, head + step + fronts + flowing),
    }
    if shapes.evaluation is not None:
        shape = shapes.evaluation
        running = run(shape)
        logits = head_bytes(anatomy, tile, shape.head_tokens)
        moments["evaluation"] = (
            0, max(running.forward, logits) + 2 * running.input + running.front,
        )  # fmt: skip
    if shapes.prompts is not None and recipe.evaluation is not None:
        running = run(shapes.prompts)
        cache = planner.cache_bytes(shapes.prompts, recipe.evaluation.max_new_tokens)
        moments["generation"] = (0, running.forward + 2 * running.input + cache)
    return inputs, moments


def store_bytes(layout: Layout) -> int:
    """Of the store, both extents of a piece included where it has two."""
    return sum(piece.padded * piece.copies for piece in layout.pieces)


def _count_disk(
    planner: "Planner", way: "Way", recipe: Recipe, plan: Streamed, shapes: Shapes, spilled: int
) -> None:
    layout, offload = plan.layout, recipe.offload
    embedding = layout.matrices[0].tiling
    ids = spread_ids(sum(shape.tokens for shape in shapes.step), embedding.rows)
    moved = traffic(layout, plan.settings, ids)
    if offload.kind == "ssd":
        way.disk["store"] = store_bytes(layout)
        way.read = moved.read + moved.gradients_read
        way.written = moved.written + moved.gradients_written
        if moved.gradients_written:
            way.disk["gradients"] = sum(
                piece.padded for piece in gradient_pieces(layout.weight_pieces)
            )
    if spilled:
        way.disk["activations"] = round_up(spilled)
        way.read += round_up(spilled)
        way.written += round_up(spilled)
    each = sum(piece.padded for piece in layout.pieces)
    if not plan.full:
        each = gradient_bytes(plan.model) + state_bytes(recipe, plan.model)
    planner.add_checkpoints(way, recipe, each, commits=plan.full and offload.kind == "ssd")


def least_streamed(recipe: Recipe, plan: Streamed) -> dict[str, int]:
    """What a streamed run keeps in memory, without what is an estimate."""
    parts = dict(plan.layout.resident())
    if recipe.offload.kind == "host":
        parts["weights and states"] = store_bytes(plan.layout)
    if not plan.full:
        parts["adapters, gradients and states"] = 2 * gradient_bytes(plan.model) + state_bytes(
            recipe, plan.model
        )
    return parts
