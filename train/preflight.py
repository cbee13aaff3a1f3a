"""Checks that need no torch: data files exist, their rows parse and suit the objective. Runs before
anything heavy.
"""

import logging
import os
from pathlib import Path

from mnemic.models.memory.episode import MemoryConfig
from mnemic.train.data.formats import FormatError
from mnemic.train.data.rows import BadRow, Source
from mnemic.train.data.sources import open_source
from mnemic.train.errors import UserError
from mnemic.train.launch import check_sharded, launched, micro_batch_size, num_ranks
from mnemic.train.objectives.check import check_row
from mnemic.train.recipe.data import Data, HubData, KvStreamData, ParquetData
from mnemic.train.recipe.recipe import Recipe
from mnemic.train.recipe.training import WandbTracking

log = logging.getLogger("mnemic")

LIMIT_BYTES = 64 << 20
"""Files are checked whole up to this size, and to this many bytes beyond it."""


def turns_of(recipe: Recipe) -> MemoryConfig | None:
    """The memory on whose turns generated streams give rows, for objectives `sft` and `distill`."""
    if recipe.memory is None or recipe.objective.kind not in ("sft", "distill"):
        return None
    return MemoryConfig(**recipe.memory.model_dump())


def check_data(recipe: Recipe) -> list[str]:
    """One line about each data section. Raises `UserError` at the first row that would stop the
    run.
    """
    sections: list[tuple[str, Data]] = [("data", recipe.data)]
    if recipe.evaluation and recipe.evaluation.data:
        sections.append(("evaluation.data", recipe.evaluation.data))
    notes = []
    for key, data in sections:
        if isinstance(data, HubData):
            notes.append(f"{key}: {data.name} is loaded when training starts")
            continue
        source = open_source(data, key=key, turns=turns_of(recipe))
        notes.append(_check_rows(source, data, key, recipe))
    return notes


def _check_rows(source: Source, data: Data, key: str, recipe: Recipe) -> str:
    good = bad = 0
    seen_bytes = 0
    whole = True
    first_bad: BadRow | None = None
    for row in source.read(None):
        if not isinstance(row, BadRow):
            try:
                check_row(row, recipe.objective, recipe.adapters)
                good += 1
                seen_bytes += sum(len(v) for v in row.fields.values() if isinstance(v, str)) + 64
            except FormatError as error:
                row = row.bad(error)
        if isinstance(row, BadRow):
            bad += 1
            first_bad = first_bad or row
            if data.on_bad_row == "stop":
                raise UserError(
                    f"{row.where}: {row.reason}; mend the row, "
                    f"or set {key}.on_bad_row=skip to go on without such rows"
                )
        sampled = isinstance(data, (ParquetData, KvStreamData))
        if seen_bytes > LIMIT_BYTES or (sampled and good >= 1000):
            whole = False
            break
    if not good:
        reason = f"; the first: {first_bad.where}: {first_bad.reason}" if first_bad else ""
        raise UserError(f"{key}: no usable row in {bad} rows{reason}")
    about = "all" if whole else "the first"
    skipped = f", {bad} bad rows will be skipped" if bad else ""
    return f"{key}: {about} {good:,} rows read well{skipped}"


def check_environment(recipe: Recipe) -> None:
    """Optional packages the recipe needs, and whether the model's folder is one."""
    from importlib.util import find_spec

    model, adapters, track = recipe.model, recipe.adapters, recipe.track
    if isinstance(track, WandbTracking) and track.mode != "disabled" and not find_spec("wandb"):
        raise UserError(
            "track.kind=wandb needs wandb: pip install 'mnemic[track]', or set track=none"
        )
    if adapters.kind == "qlora" and not find_spec("bitsandbytes"):
        raise UserError("adapters.kind=qlora needs bitsandbytes: pip install 'mnemic[offload]'")
    if adapters.kind == "qlora" and model.kind == "tiny":
        raise UserError(
            "adapters.kind=qlora quantises a pretrained model; the tiny one is built in fp32"
        )
    engines = [e for e in ("FSDP", "DEEPSPEED") if launched(e)]
    if recipe.update.kind == "streamed":
        check_streamed(recipe, engines)
    check_optimizer(recipe.optimizer.kind)
    check_sharded(recipe)
    check_tokens_launch(recipe, engines)
    if recipe.objective.kind == "grpo" and engines:
        raise UserError(
            "objective.kind=grpo writes rollouts with the whole model, which FSDP and DeepSpeed "
            "hold in shards; launch with DDP (recipes/accelerate/ddp.yaml)"
        )
    if adapters.kind == "bank" and len(adapters.operations) > 1:
        check_joint(engines)
    if recipe.update.kind == "in_backward" and engines:
        raise UserError(
            "update.kind=in_backward works on one device or with whole copies on several; set "
            "update.kind=plain, or launch without FSDP and DeepSpeed"
        )
    if model.weights == "int8" and num_ranks() > 1:
        raise UserError(
            "model.weights=int8 trains in one process; launch one, or set model.weights=full"
        )
    micro_batch_size(recipe, num_ranks())
    if model.kind == "pretrained":
        path = Path(model.path).expanduser()
        looks_local = model.path.startswith((".", "/", "~")) or model.path.count("/") > 1
        if looks_local and not path.exists():
            raise UserError(f"model.path: {model.path} not found (from {Path.cwd()})")
        if path.is_dir() and not (path / "config.json").is_file():
            raise UserError(
                f"model.path: {path} has no config.json; give a folder save_pretrained wrote"
            )


def check_tokens_launch(recipe: Recipe, engines: list[str]) -> None:
    """What token sparsity cannot be launched with, and whether its files are there."""
    tokens = recipe.tokens
    if tokens.kind == "none":
        return
    if "DEEPSPEED" in engines:
        raise UserError(
            f"tokens.kind={tokens.kind} looks into a layer's weights before DeepSpeed has gathered "
            "them; set tokens=none, or launch with DDP or FSDP2"
        )
    for key in ("score_path", "thresholds"):
        value = getattr(tokens, key)
        if value and not Path(value).expanduser().exists():
            raise UserError(f"tokens.{key}: {value} not found (from {Path.cwd()})")


def check_joint(engines: list[str]) -> None:
    """What several experts in one run cannot be launched with: each batch trains one of them."""
    if engines:
        raise UserError(
            "adapters.kind=bank with several operations leaves weights without a gradient in each "
            "batch, which FSDP and DeepSpeed do not take; launch with DDP, or train one operation"
        )


def check_streamed(recipe: Recipe, engines: list[str]) -> None:
    """What a streamed run cannot be launched with, and what has no effect on it."""
    if engines or num_ranks() > 1:
        raise UserError(
            "update.kind=streamed trains on one device; launch one process, or set "
            "update.kind=plain and shard by recipes/accelerate/fsdp2.yaml or zero3_nvme.yaml"
        )
    if recipe.loop.gradient_checkpointing:
        log.warning(
            "loop.gradient_checkpointing has no effect with update.kind=streamed, which keeps "
            "layer inputs only"
        )


_FSDP2 = ("adamw", "sgd", "apollo", "apollo_mini")
_LIBRARIES = {
    "adamw8bit": "bitsandbytes",
    "muon": "pytorch_optimizer",
    "galore": "pytorch_optimizer",
}


def check_optimizer(kind: str) -> None:
    """Whether the optimizer's library is here, and whether it works under the engine that
    `accelerate launch` has announced in the environment.
    """
    from importlib.util import find_spec

    key = f"optimizer.kind={kind}"
    library = _LIBRARIES.get(kind)
    if library and not find_spec(library):
        raise UserError(
            f"{key} needs {library}: pip install 'mnemic[optimizers]', or set optimizer.kind=adamw"
        )
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" and kind != "adamw":
        # SGD survives ZeRO itself, not the offload.
        offload = os.environ.get("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "none")
        if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
            offload = "in a file of its own"
        if kind != "sgd" or offload != "none":
            raise UserError(
                f"{key} does not work under DeepSpeed, which flattens parameters and, where it "
                "offloads the optimizer, puts its own Adam in the place of any other; set "
                "optimizer.kind=adamw, or launch with DDP" + (" or FSDP2" if kind in _FSDP2 else "")
            )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        if kind not in _FSDP2:
            raise UserError(
                f"{key} needs whole tensors, and FSDP shards them; set optimizer.kind=apollo, "
                "apollo_mini or adamw, or launch with DDP"
            )
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise UserError(
                f"{key} and checkpoints need the rows of a matrix, and FSDP 1 flattens them; "
                "launch with fsdp_version: 2 in the accelerate configuration, or with DDP"
            )


def is_main_process() -> bool:
    """Rank 0, as torchrun and accelerate launch say, before torch is there to ask."""
    return os.environ.get("RANK", "0") == "0"
