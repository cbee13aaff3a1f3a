"""Checkpoints of weights and optimizer state that lie in shards, and of any number of ranks.

Under FSDP2 every rank writes its own rows by torch.distributed.checkpoint (DCP), so that no host
holds the whole model to save it:

    sharded/.metadata              which rows of which tensor lie in which file
            __0_0.distcp  ...      what rank 0 wrote, rank 1 wrote, ...

Tensors are named `model.<parameter>` and `optimizer.<parameter>.<key>`, by parameter and not by
rank or place in a group: whoever loads says which rows it wants. One process, DDP and FSDP2 on any
number of ranks therefore read these folders, and FSDP2 reads its rows out of the whole files that
one process and DDP write.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mnemic.optim.apollo import Apollo
from mnemic.optim.shards import local, shard_of
from mnemic.train.errors import UserError
from mnemic.train.state import load_trained, trained_tensors

FOLDER, WHOLE = "sharded", "model.safetensors"


def save_parts(module: nn.Module, optimizer: Any, folder: Path) -> None:
    """Write this rank's rows of the trained weights and of `optimizer`'s state; all ranks
    together.
    """
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    save(tensors_of(module, optimizer), storage_writer=FileSystemWriter(folder), no_dist=_alone())


def tensors_of(module: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """What `save_parts` writes, by name; shared with the model and the optimizer."""
    found = {f"model.{name}": tensor for name, tensor in trained_tensors(module).items()}
    for name, param, _, _ in _places(module, optimizer):
        for key, value in _inner(optimizer).state.get(param, {}).items():
            found[f"optimizer.{name}.{key}"] = value
    return found


def load_weights(module: nn.Module, checkpoint: Path) -> None:
    """The trained weights of a checkpoint, in shards or whole, into a module that is in shards or
    whole. Other names or shapes are a `UserError`.
    """
    if (checkpoint / FOLDER).is_dir():
        _read(checkpoint / FOLDER, _templates(module, checkpoint / FOLDER))
    elif any(hasattr(p, "placements") for p in module.parameters()):
        _load_rows(module, checkpoint / WHOLE)
    else:
        load_trained(module, checkpoint / WHOLE)


def load_optimizer(
    module: nn.Module, optimizer: Any, checkpoint: Path, saved: dict[str, Any]
) -> None:
    """The optimizer's state of a checkpoint; `saved`: what its trainer.pt holds of it, all of it
    where the checkpoint is whole.
    """
    state: dict[int, dict[str, Tensor]] = {}
    folder = checkpoint / FOLDER
    if folder.is_dir():
        keys = _saved(folder)
        wanted: dict[str, Tensor] = {}
        for name, param, group, index in _places(module, optimizer):
            prefix = f"optimizer.{name}."
            own = {k.removeprefix(prefix): v for k, v in keys.items() if k.startswith(prefix)}
            if own:
                state[index] = _fresh_state(optimizer, group, param, own)
                wanted |= {prefix + key: value for key, value in state[index].items()}
        _read(folder, wanted)
    else:
        for _, param, group, index in _places(module, optimizer):
            own = saved["state"].get(index)
            if own:
                state[index] = _fresh_state(optimizer, group, param, own)
                for key, value in state[index].items():
                    local(value).copy_(_rows_of(value, own[key]))
    inner = _inner(optimizer)
    inner.load_state_dict({"state": state, "param_groups": inner.state_dict()["param_groups"]})


def gather(module: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """Whole parameters and persistent buffers on the CPU for `save_pretrained`, tied ones once, by
    all ranks together, tensor by tensor; ranks without `keep` hold one at a time and return none.
    """
    persistent = module.state_dict().keys()
    buffers = [(name, b) for name, b in module.named_buffers() if name in persistent]
    state = {}
    for name, tensor in [*module.named_parameters(), *buffers]:
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]
        if keep:
            state[name] = whole.detach().cpu()
    return state


def _inner(optimizer: Any) -> Any:
    """Without accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _alone() -> bool:
    return not (dist.is_available() and dist.is_initialized())


def _places(module: nn.Module, optimizer: Any) -> Iterator[tuple[str, Tensor, dict[str, Any], int]]:
    """(name, parameter, group, number in the optimizer's state_dict) of all its parameters."""
    names = {id(param): name for name, param in module.named_parameters()}
    index = 0
    for group in _inner(optimizer).param_groups:
        for param in group["params"]:
            yield names[id(param)], param, group, index
            index += 1


def _fresh_state(
    optimizer: Any, group: dict[str, Any], param: Tensor, saved: dict[str, Any]
) -> dict[str, Tensor]:
    """State to load into, placed as the optimizer would place it: APOLLO says so itself, since its
    low-rank state is sharded or not by the shape of the matrix. Of the others a moment lies as the
    parameter does, and a count is a number on the CPU.
    """
    inner = _inner(optimizer)
    if isinstance(inner, Apollo):
        return inner.new_state(group, param)
    return {
        key: torch.zeros_like(param.detach()) if tuple(_shape(value)) else torch.zeros(())
        for key, value in saved.items()
    }


def _shape(value: Any) -> Any:
    """Of a tensor, or of what DCP's metadata says of one."""
    return value.shape if isinstance(value, Tensor) else value.size


def _saved(folder: Path) -> dict[str, Any]:
    """DCP's metadata: names of tensors to what is known of them."""
    from mnemic.train.sharded_reader import SafeReader

    return SafeReader(folder).read_metadata().state_dict_metadata


def _templates(module: nn.Module, folder: Path) -> dict[str, Tensor]:
    """The module's trained tensors by their names in `folder`, found to be the ones in it."""
    saved = {k: v for k, v in _saved(folder).items() if k.startswith("model.")}
    present = {f"model.{name}": tensor for name, tensor in trained_tensors(module).items()}
    _check_same(folder, {k: _shape(v) for k, v in saved.items()}, present)
    return present


def _check_same(path: Path, saved: dict[str, Any], present: dict[str, Tensor]) -> None:
    if saved.keys() != present.keys():
        odd = sorted(saved.keys() ^ present.keys())
        raise UserError(
            f"{path}: holds other weights than this model trains ({len(odd)} names differ, "
            f"such as {odd[0].removeprefix('model.')}); resume with the recipe that wrote it"
        )
    for name, tensor in present.items():
        if tuple(tensor.shape) != tuple(saved[name]):
            raise UserError(
                f"{path}: {name.removeprefix('model.')} is {tuple(saved[name])}, the model's is "
                f"{tuple(tensor.shape)}; resume with the recipe that wrote it"
            )


def _read(folder: Path, wanted: dict[str, Tensor]) -> None:
    """Fill `wanted`, each rank its own rows."""
    from torch.distributed.checkpoint.state_dict_loader import load

    from mnemic.train.sharded_reader import SafeReader

    with torch.no_grad(), warnings.catch_warnings():
        # One process reads all rows: that is what it is for.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(wanted, storage_reader=SafeReader(folder), no_dist=_alone())


def _load_rows(module: nn.Module, path: Path) -> None:
    """This rank's rows out of a whole safetensors file, without the rest of it in memory."""
    from safetensors import safe_open

    present = trained_tensors(module)
    with safe_open(path, framework="pt") as file, torch.no_grad():
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        _check_same(path, {n: s.get_shape() for n, s in slices.items()}, present)
        for name, tensor in present.items():
            whole = slices[name]
            rows = _range_of(tensor)
            local(tensor).copy_(whole[rows] if rows else file.get_tensor(name))


def _rows_of(tensor: Tensor, whole: Tensor) -> Tensor:
    rows = _range_of(tensor)
    return whole[rows] if rows else whole


def _range_of(tensor: Tensor) -> slice | None:
    """Which rows of the whole this rank holds of `tensor`; None for all."""
    shard = shard_of(tensor)
    if shard.group is None:
        return None
    return slice(shard.first_row, shard.first_row + local(tensor).shape[0])
