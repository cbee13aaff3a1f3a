"""Accelerate's set-up for a recipe."""

import socket
import uuid
from pathlib import Path
from typing import Any

from mnemic.train.errors import UserError
from mnemic.train.launch import launched
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


def check_shared(accelerator: Any, folder: Path) -> None:
    """`UserError` on every rank unless all see the run folder that rank 0 sees: each of them reads
    checkpoints there, and under FSDP2 writes its part of them.
    """
    if accelerator.num_processes == 1:
        return
    from accelerate.utils import broadcast_object_list, gather_object

    # A name that nobody has asked for before: a file system's memory of absent files knows it not.
    name = f".shared-{uuid.uuid4().hex}"
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (name,) = broadcast_object_list([name])
    own = (accelerator.process_index, socket.gethostname(), (folder / name).exists())
    found = gather_object([own])
    if accelerator.is_main_process:
        (folder / name).unlink()
    lacking = [f"{rank} ({host})" for rank, host, seen in found if not seen]
    if lacking:
        raise UserError(
            f"run_dir: {folder} is another folder, or none, on rank {', '.join(lacking)} than on "
            f"rank 0 ({found[0][1]}); give the path of a folder on a file system that all machines "
            "share"
        )


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
