"""What the launcher announces in the environment, against what a recipe and its checkpoint can be
run with. No torch: these checks come before it is imported.
"""

import os
from pathlib import Path

from mnemic.train.checkpoint import written_by
from mnemic.train.errors import UserError
from mnemic.train.recipe.memory import GrpoObjective
from mnemic.train.recipe.recipe import Recipe


def num_ranks() -> int:
    """Processes of this run on all machines, as torchrun and accelerate launch say."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched(engine: str) -> bool:
    """Whether the launcher has announced `FSDP` or `DEEPSPEED` in the environment."""
    return os.environ.get(f"ACCELERATE_USE_{engine}") == "true"


def micro_batch_size(recipe: Recipe, world: int) -> int:
    """Rows in one forward; `UserError` where the global batch does not divide evenly over the
    ranks. Rollouts need not: each gives as many rows as its stream has chunks.
    """
    loop = recipe.loop
    if loop.batch_size % world:
        raise UserError(
            f"loop.batch_size={loop.batch_size} cannot be shared by {world} processes; "
            f"take a multiple of {world}"
        )
    micro = loop.micro_batch_size or loop.batch_size // world
    if isinstance(recipe.objective, GrpoObjective):
        return micro
    if loop.batch_size % (micro * world):
        raise UserError(
            f"loop.batch_size={loop.batch_size} is not a multiple of "
            f"micro_batch_size * processes = {micro} * {world}; change one of them"
        )
    return micro


def check_sharded(recipe: Recipe) -> None:
    """What a model in shards (FSDP2, DeepSpeed) cannot do beside the optimizer's own limits."""
    engine = next((e for e in ("FSDP", "DEEPSPEED") if launched(e)), None)
    if engine is None:
        return
    if getattr(recipe.optimizer, "rest", None) == "adamw8bit":
        raise UserError(
            "optimizer.rest=adamw8bit keeps its state in blocks of what one rank holds, which "
            "other ranks could not go on with; set optimizer.rest=adamw, or launch with DDP"
        )
    if recipe.evaluation is not None and recipe.evaluation.play:
        raise UserError(
            f"evaluation.play={recipe.evaluation.play} plays other episodes on each rank, and "
            "FSDP and DeepSpeed gather weights on all of them together; set evaluation.play=null, "
            "or launch with DDP"
        )
    distill = recipe.objective if recipe.objective.kind == "distill" else None
    if distill is not None and engine == "DEEPSPEED":
        raise UserError(
            "objective.kind=distill runs a second model, which DeepSpeed's set-up would shard with "
            "the first; launch with DDP or FSDP2"
        )
    if distill is not None and distill.on_policy:
        raise UserError(
            f"objective.on_policy={distill.on_policy:g} samples on each rank by itself, and FSDP "
            "gathers weights on all of them together; set it to 0, or launch with DDP"
        )


def check_resume(start: Path | None) -> None:
    """Whether the engine that was launched can go on from a checkpoint."""
    if start is None:
        return
    engine, ranks = written_by(start)
    world = num_ranks()
    if ranks is not None and (engine == "deepspeed") != launched("DEEPSPEED"):
        way = "under" if engine == "deepspeed" else "without"
        raise UserError(
            f"{start}: written {way} DeepSpeed, whose checkpoints no other engine reads, and which "
            f"reads none of theirs; resume it {way} DeepSpeed, or choose another run_dir"
        )
    if engine == "deepspeed" and ranks is not None and ranks != world:
        raise UserError(
            f"{start}: written by {ranks} ranks of DeepSpeed, which does not spread its optimizer "
            f"states over {world}; launch {ranks} processes, or choose another run_dir. Runs under "
            "DDP and FSDP2 go on with any number"
        )
    config = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "")
    if not config or not Path(config).is_file():
        return
    if '"nvme"' in Path(config).read_text("utf-8"):
        raise UserError(
            f"{start}: DeepSpeed does not restore the optimizer states that it keeps on NVMe, so a "
            "resumed run would be another run; choose another run_dir, or launch with "
            "zero3_cpu.yaml, which resumes"
        )
