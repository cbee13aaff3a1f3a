"""From a recipe to a streamed model: skeleton, optimizer, engine, weights."""

import logging
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mnemic.models.load import LoadError, load_causal_lm, torch_dtype
from mnemic.optim.apollo import Apollo
from mnemic.optim.groups import decay_groups
from mnemic.train.build import add_adapters, model_folder
from mnemic.train.errors import UserError
from mnemic.train.exact import install
from mnemic.train.offload.activations import layer_inputs
from mnemic.train.offload.copies import DATA, adopt
from mnemic.train.offload.engine import Engine, Layout, Settings, lay_out
from mnemic.train.offload.files import SsdFile
from mnemic.train.offload.io import Trace
from mnemic.train.offload.skeleton import dissect, is_adapter, tie, without_weights
from mnemic.train.offload.store import Plan
from mnemic.train.offload.transfer import (
    Reader,
    local_folder,
    read_model,
    read_safetensors,
    safetensors_of,
)
from mnemic.train.offload.work import WorkFolders
from mnemic.train.optimizers import build_optimizer
from mnemic.train.recipe.model import NoAdapters, TinyModel
from mnemic.train.recipe.offload import NoOffload
from mnemic.train.recipe.optimizer import AdamW
from mnemic.train.recipe.recipe import Recipe
from mnemic.train.recipe.training import StreamedUpdate as StreamedPart

log = logging.getLogger("mnemic")


@dataclass
class Streamed:
    """A streamed model before its weights are there."""

    model: Any
    optimizer: Any
    layout: Layout
    settings: Settings
    names: dict[int, str]
    full: bool


def skeleton(recipe: Recipe, tokenizer: Any, device: torch.device) -> Any:
    """The recipe's model without weights, adapters (real ones) included."""
    part = recipe.model
    if isinstance(part, TinyModel):
        from mnemic.models.tiny import tiny_config

        config = tiny_config(
            tokenizer, hidden_size=part.hidden_size, layers=part.layers, heads=part.heads,
            max_position=part.max_position,
        )  # fmt: skip
        attention = None
    else:
        from transformers import AutoConfig

        folder = model_folder(recipe)
        try:
            config = AutoConfig.from_pretrained(
                folder, revision=getattr(part, "revision", None),
                trust_remote_code=getattr(part, "trust_remote_code", False),
            )  # fmt: skip
        except (OSError, ValueError, KeyError) as error:
            reason = next((t for t in str(error).splitlines() if t.strip()), repr(error))
            raise UserError(f"model: {folder} could not be read: {reason.strip()}") from error
        attention = getattr(part, "attention", None)
    model = without_weights(config, torch_dtype(part.dtype), device, attention)
    model.config.use_cache = True
    if isinstance(part, TinyModel) or getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    if not isinstance(recipe.adapters, NoAdapters):
        try:
            model = add_adapters(recipe, model)
        except LoadError as error:
            raise UserError(f"model: {error}") from error
        tie(model.get_base_model())
    install(recipe.loop, model)
    return model


def streamed(
    recipe: Recipe, tokenizer: Any, device: torch.device, folders: tuple[Path, ...] = (),
    *, copy: bool = False,
) -> Streamed:  # fmt: skip
    """Everything that can be known without allocating: what `mnemic plan` and a run both need.
    `copy`: laid out as a checkpoint's copy of the store.
    """
    assert isinstance(recipe.update, StreamedPart) and not isinstance(recipe.offload, NoOffload)
    offload, full = recipe.offload, isinstance(recipe.adapters, NoAdapters)
    model = skeleton(recipe, tokenizer, device)
    inner = model if full else model.get_base_model()
    anatomy = dissect(inner)
    names = {id(p): n for n, p in inner.named_parameters()}
    settings = Settings(
        kind=offload.kind, folders=folders, ram_budget=offload.ram_budget, states=offload.states,
        direct=getattr(offload, "direct", True), clip=recipe.update.clip if full else "none",
        base=getattr(offload, "base", "full"), single=copy,
    )  # fmt: skip
    if copy:
        settings = replace(settings, clip="none", kind="ssd")
    part, seed = recipe.optimizer, recipe.loop.seed
    if full and isinstance(part, AdamW):
        groups = [{**g, "rule": "adamw"} for g in decay_groups(model, part.weight_decay)]
        betas = (part.beta1, part.beta2)
        optimizer: Any = Apollo(groups, part.lr, betas=betas, eps=part.eps, rule="adamw", seed=seed)
    else:
        optimizer = build_optimizer(part, model, seed=seed)
    layout = lay_out(anatomy, optimizer if full else None, settings, names)
    return Streamed(model, optimizer, layout, settings, names, full)


def build_engine(
    recipe: Recipe, tokenizer: Any, device: torch.device, work: WorkFolders | None,
    trace: Trace | None = None,
) -> tuple[Streamed, Engine]:  # fmt: skip
    """The engine over the claimed folders, still empty."""
    ssd = recipe.offload.kind == "ssd"
    folders = work.paths if work is not None and ssd else ()
    plan = streamed(recipe, tokenizer, device, folders)
    if folders:
        _check_room(plan, folders)
    assert not isinstance(recipe.offload, NoOffload)
    inputs = layer_inputs(
        recipe.offload, work.paths[0] if work is not None else None, device, trace=trace,
        num_layers=len(plan.layout.blocks), resident=sum(plan.layout.resident().values()),
    )  # fmt: skip
    engine = Engine(
        plan.layout, plan.settings, folder=folders[0] if folders else None, names=plan.names,
        device=device, autocast=_autocast(recipe, device), trace=trace, inputs=inputs,
    )  # fmt: skip
    return plan, engine


def open_copy(
    recipe: Recipe, tokenizer: Any, device: torch.device, checkpoint: Path
) -> tuple[Streamed, Engine]:
    """A model run from the copy in a checkpoint folder."""
    plan = streamed(recipe, tokenizer, device, (checkpoint,), copy=True)
    flat = Plan(plan.layout.pieces)
    engine = Engine(
        plan.layout, plan.settings, folder=None, names=plan.names, device=device,
        autocast=_autocast(recipe, device),
        backends=[SsdFile(checkpoint / DATA, flat.sizes[0], writable=False)],
    )  # fmt: skip
    adopt(engine.store, checkpoint)
    engine.reload()
    return plan, engine


def _autocast(recipe: Recipe, device: torch.device) -> Callable[[], Any]:
    if recipe.loop.precision != "bf16":
        return nullcontext
    # Cached casts would outlive the weights they are of.
    return partial(torch.autocast, device.type, dtype=torch.bfloat16, cache_enabled=False)


def _check_room(plan: Streamed, folders: tuple[Path, ...]) -> None:
    sizes = Plan(plan.layout.pieces, len(folders)).sizes
    for folder, size in zip(folders, sizes, strict=True):
        have = (folder / "data.bin").stat().st_size if (folder / "data.bin").exists() else 0
        free = shutil.disk_usage(folder).free + have
        if free < size:
            raise UserError(
                f"offload: {folder} has {free:,} bytes free and the model with its optimizer state "
                f"takes {size:,}; make room, set offload.path to another disk, or take an "
                "optimizer with less state (apollo_mini, or offload.states=8bit)"
            )


def source(recipe: Recipe, tokenizer: Any, plan: Streamed) -> Reader:
    """Where the first weights come from: safetensors by the tile, or a model loaded once."""
    from mnemic.train.build import build_model

    part = recipe.model
    if isinstance(part, TinyModel):
        plain = recipe.model_copy(update={"adapters": NoAdapters()})
        return read_model(build_model(plain, tokenizer))
    folder = local_folder(model_folder(recipe), getattr(part, "revision", None))
    inner = plan.layout.anatomy.model
    shapes = {n: tuple(p.shape) for n, p in inner.named_parameters() if not is_adapter(n)}
    where = safetensors_of(folder)
    if where is not None:
        reader = read_safetensors(where, list(shapes), shapes, inner.base_model_prefix)
        if reader is not None:
            return reader
    log.warning(
        "%s: its weights are not safetensors under the names of %s's parameters; the model is "
        "loaded whole this once, which takes its size in memory", folder, type(inner).__name__,
    )  # fmt: skip
    try:
        whole = load_causal_lm(
            str(folder), dtype=part.dtype,
            trust_remote_code=getattr(part, "trust_remote_code", False),
        )  # fmt: skip
    except LoadError as error:
        raise UserError(f"model: {error}") from error
    return read_model(whole)


def describe(layout: Layout) -> str:
    """One line: what stays in memory."""
    parts = [f"{k} {v / 2**20:,.1f} MiB" for k, v in layout.resident().items() if v]
    return ", ".join(parts)
