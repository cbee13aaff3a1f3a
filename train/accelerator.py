"""Accelerate's set-up for a recipe, and how a step's rows are shared out over the ranks."""

from typing import Any

from mnemic.train.errors import UserError
from mnemic.train.launch import launched
from mnemic.train.recipe.memory import GrpoObjective
from mnemic.train.recipe.recipe import Recipe
from mnemic.train.recipe.training import Loop


def make_accelerator(loop: Loop, *, unused: bool = False) -> Any:
    """Accelerate's device and process set-up; autocast is the trainer's own except under sharded
    engines. `unused`: batches leave some trained weights without a gradient.
    """
    import torch
    from accelerate import Accelerator, DistributedDataParallelKwargs

    fsdp, deepspeed = (launched(engine) for engine in ("FSDP", "DEEPSPEED"))
    cpu = loop.device == "cpu" or not torch.accelerator.is_available()
    # Told to take the CPU, accelerate leaves DeepSpeed out without a word.
    cpu = cpu and not deepspeed
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision="bf16" if (fsdp or deepspeed) and loop.precision == "bf16" else "no",
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)]
        if unused
        else None,
    )
    if fsdp and cpu and accelerator.num_processes > 1:
        _shard_on_cpu(accelerator)
    return accelerator


def _shard_on_cpu(accelerator: Any) -> None:
    """Make CPU ranks shard too: accelerate reads FSDP's settings, takes them for accelerators only,
    and would go on with whole copies without a word. torch's `fully_shard` works over gloo.
    """
    from accelerate import DistributedType
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import FullyShardedDataParallelPlugin

    plugin = FullyShardedDataParallelPlugin()
    if accelerator.mixed_precision != "no":
        plugin.set_mixed_precision(accelerator.mixed_precision)
    found = {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    AcceleratorState._shared_state.update(found)
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP


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
