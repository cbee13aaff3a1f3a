"""Refuses a run that cannot fit, before its weights are read; and says which neighbour would.

Only what is exact counts here (weights, gradients, optimizer state, the buffers of a streamed
model), against all the memory there is: a run that is refused could not have gone on.
"""

import json
import os
from pathlib import Path
from typing import Any

from mnemic.train.errors import UserError
from mnemic.train.plan.machine import this_machine
from mnemic.train.recipe.load import build_recipe, dump_recipe
from mnemic.train.recipe.model import PretrainedModel, SmolLM2, TinyModel
from mnemic.train.recipe.recipe import Recipe
from mnemic.train.recipe.training import InBackwardUpdate, StreamedUpdate

WAYS: dict[str, tuple[str, str]] = {
    "plain": ("plain", "none"),
    "in_backward": ("in_backward", "none"),
    "streamed host": ("streamed", "host"),
    "streamed ssd": ("streamed", "ssd"),
}
"""Name -> update.kind and offload.kind."""

_SMOLLM2 = 134_515_008  # parameters


def neighbour(recipe: Recipe, name: str) -> Recipe:
    """The recipe run another way, everything else the same; `RecipeError` where it is refused."""
    update, offload = WAYS[name]
    if (recipe.update.kind, recipe.offload.kind) == (update, offload):
        return recipe
    tree = dump_recipe(recipe)
    if recipe.update.kind != update:
        tree["update"] = {"kind": update}
    if recipe.offload.kind != offload:
        old, new = tree["offload"], {"kind": offload}
        kept = {"activations"} if offload == "none" else {"activations", "ram_budget", "states"}
        new |= {key: old[key] for key in kept if key in old}
        if isinstance(old["path"], str) and (offload == "ssd" or new["activations"] == "ssd"):
            new["path"] = old["path"]
        tree["offload"] = new
    return build_recipe(tree)


def check_fits(recipe: Recipe, tokenizer: Any, device: Any) -> None:
    """`UserError` where the machine cannot hold the recipe's least. For one process: engines that
    shard are left to themselves. A model whose files are small is not even looked at.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or any(
        os.environ.get(f"ACCELERATE_USE_{engine}") == "true" for engine in ("FSDP", "DEEPSPEED")
    ):
        return
    from mnemic.train.plan.sizes import teacher_bytes

    machine = this_machine(device)
    have, what = machine.total, machine.limit
    if machine.device_total and not isinstance(recipe.update, StreamedUpdate):
        have, what = machine.device_total, "the memory of the device"
    most = _most_bytes(recipe)
    if most is not None and most + teacher_bytes(recipe) < min(have, machine.total):
        return
    parts = least_bytes(recipe, tokenizer, device)
    if sum(parts.values()) <= have:
        return
    shown = ", ".join(f"{name} {_gib(size)}" for name, size in parts.items() if size >> 20)
    raise UserError(
        f"this run would take at least {_gib(sum(parts.values()))} ({shown}), and there are "
        f"{_gib(have)} ({what}); {_advice(recipe, tokenizer, device, have)}"
    )


def least_bytes(recipe: Recipe, tokenizer: Any, device: Any) -> dict[str, int]:
    """What the recipe takes at the least, by part."""
    from mnemic.train.offload.build import streamed
    from mnemic.train.plan.sizes import (
        empty_model,
        gradient_bytes,
        largest_gradient,
        quiet,
        state_bytes,
        teacher_bytes,
        weight_bytes,
    )

    if isinstance(recipe.update, StreamedUpdate):
        from mnemic.train.plan.streamed import least_streamed

        with quiet():
            return least_streamed(recipe, streamed(recipe, tokenizer, device))
    model = empty_model(recipe, tokenizer, device)
    micro = recipe.loop.micro_batch_size or recipe.loop.batch_size
    freed = isinstance(recipe.update, InBackwardUpdate) and recipe.loop.batch_size == micro
    return {
        "weights": weight_bytes(recipe, model),
        "gradients": largest_gradient(model) if freed else gradient_bytes(model),
        "optimizer state": state_bytes(recipe, model),
        "teacher": teacher_bytes(recipe),
    }


def _advice(recipe: Recipe, tokenizer: Any, device: Any, have: int) -> str:
    fitting = []
    for name, (update, offload) in WAYS.items():
        try:
            other = neighbour(recipe, name)
            size = sum(least_bytes(other, tokenizer, device).values())
        except UserError:
            continue
        if size <= have:
            fitting.append(f"update={update} offload={offload} ({_gib(size)})")
    if not fitting:
        return "take a smaller model, adapters=lora, or optimizer=apollo_mini update=streamed"
    return f"what fits is {', or '.join(fitting)}; mnemic plan shows the rest of it"


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:,.1f} GiB"


def _most_bytes(recipe: Recipe) -> int | None:
    """More than weights, gradients and states can be, from the size of the model's files alone;
    None where they are not here.
    """
    model = recipe.model
    if isinstance(model, TinyModel):
        # Attention and MLP have at most 12 widths squared, whatever the heads.
        parameters = model.layers * 13 * model.hidden_size**2 + 600 * model.hidden_size
    elif isinstance(model, SmolLM2):
        parameters = _SMOLLM2
    else:
        parameters = _parameters_in(model)
    # fp32 weights, gradients and two moments, with a master to spare, twice over.
    return None if parameters is None else 40 * parameters


def _parameters_in(model: PretrainedModel) -> int | None:
    folder = Path(model.path).expanduser()
    index = folder / "model.safetensors.index.json"
    try:
        if index.is_file():
            total = json.loads(index.read_text("utf-8"))["metadata"]["total_size"]
        else:
            total = (folder / "model.safetensors").stat().st_size
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # Two bytes a parameter, or more.
    return int(total) // 2
