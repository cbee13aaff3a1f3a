"""Weights into the store and out of it, a tile or a layer at a time: safetensors both ways.

Only a model whose checkpoint is laid out otherwise than its parameters (experts saved one by one)
is loaded whole, once, by transformers.
"""

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mnemic.train.errors import UserError
from mnemic.train.offload.memory import bytes_of

log = logging.getLogger("mnemic")

Reader = Callable[[str, slice | None], Tensor]
"""(parameter name, rows or None for all of it) -> the tensor, on the CPU."""

_SHARD = 5_000_000_000  # bytes of a file, as transformers has it
_DTYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64",
    torch.int64: "I64", torch.int32: "I32", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
_BY_NAME = {name: dtype for dtype, name in _DTYPES.items()}


def own_name(name: str) -> str:
    """A parameter's name in a checkpoint of the base model, without what peft adds to it."""
    return name.replace(".base_layer.", ".")


def read_model(model: Any) -> Reader:
    """From a model in memory."""
    state = {own_name(name): param.detach() for name, param in model.named_parameters()}

    def read(name: str, rows: slice | None) -> Tensor:
        tensor = state[own_name(name)]
        return tensor if rows is None else tensor[rows]

    return read


class SafetensorsFile:
    """Reads tensors of a safetensors file by pread: of a mapping, every page that was read would
    count as resident, which for a model is the size of the model.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            size = int.from_bytes(os.pread(self._fd, 8, 0), "little")
            self._start, left = 8 + size, os.fstat(self._fd).st_size - 8
            header = json.loads(os.pread(self._fd, min(size, left), 8))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not a safetensors file ({error}); fetch it again") from None
        self.tensors = {k: v for k, v in header.items() if k != "__metadata__"}

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self.tensors[key]["shape"])

    def read(self, key: str, rows: slice | None) -> Tensor:
        entry = self.tensors[key]
        shape, (first, last) = list(entry["shape"]), entry["data_offsets"]
        dtype = _BY_NAME[entry["dtype"]]
        if rows is not None:
            row = (last - first) // max(1, shape[0])
            first, last = first + rows.start * row, first + rows.stop * row
            shape[0] = rows.stop - rows.start
        found = torch.empty(shape, dtype=dtype)
        if found.numel() * dtype.itemsize != last - first:
            raise UserError(f"{self.path}: {key} is damaged, its size does not fit its shape")
        view, offset = bytes_of(found), self._start + first
        done = 0
        while done < len(view):
            count = os.preadv(self._fd, [view[done : done + (8 << 20)]], offset + done)
            if count == 0:
                raise UserError(f"{self.path}: ends inside {key}; fetch it again")
            done += count
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, offset, len(view), os.POSIX_FADV_DONTNEED)
        return found

    def close(self) -> None:
        os.close(self._fd)


def safetensors_of(folder: Path) -> dict[str, Path] | None:
    """Tensor name -> file, of a folder that `save_pretrained` wrote; None without safetensors."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        files = json.loads(index.read_text("utf-8"))["weight_map"]
        return {name: folder / file for name, file in files.items()}
    if not single.is_file():
        return None
    file = SafetensorsFile(single)
    file.close()
    return dict.fromkeys(file.tensors, single)


def read_safetensors(
    where: Mapping[str, Path], names: Sequence[str], shapes: Mapping[str, tuple[int, ...]],
    prefix: str,
) -> Reader | None:  # fmt: skip
    """From files, or None where some parameter is not in them under its own name. `prefix`: name of
    the model without head, which checkpoints of that model leave out.
    """
    keys: dict[str, str] = {}
    for name in names:
        own = own_name(name)
        short = own.removeprefix(f"{prefix}.")
        found = next((k for k in (own, short, f"{prefix}.{own}") if k in where), None)
        if found is None:
            return None
        keys[name] = found
    files = {path: SafetensorsFile(path) for path in {where[key] for key in keys.values()}}
    if any(files[where[k]].shape(k) != tuple(shapes[name]) for name, k in keys.items()):
        return None

    def read(name: str, rows: slice | None) -> Tensor:
        key = keys[name]
        return files[where[key]].read(key, rows)

    return read


class SafetensorsWriter:
    """Writes tensors one after the other, each in parts: `add(part)` in the order of `tensors`,
    (name, shape, dtype). Files are cut at 5 GB, with an index, as transformers does.
    """

    def __init__(
        self, folder: Path, tensors: Sequence[tuple[str, tuple[int, ...], torch.dtype]]
    ) -> None:
        self.folder = folder
        shards: list[list[tuple[str, tuple[int, ...], torch.dtype, int]]] = [[]]
        held = 0
        for name, shape, dtype in tensors:
            size = torch.Size(shape).numel() * dtype.itemsize
            if held and held + size > _SHARD:
                shards.append([])
                held = 0
            shards[-1].append((name, tuple(shape), dtype, size))
            held += size
        count = len(shards)
        self._names = [
            "model.safetensors" if count == 1 else f"model-{i + 1:05}-of-{count:05}.safetensors"
            for i in range(count)
        ]
        self._shards, self._number, self._left = shards, -1, 0
        self._file: Any = None

    def add(self, part: Tensor) -> None:
        """The next bytes; a part never spans two tensors."""
        if self._left == 0:
            self._next_file()
        raw = bytes_of(part.detach().cpu().contiguous())
        self._file.write(raw)
        self._left -= len(raw)

    def _next_file(self) -> None:
        self._finish_file()
        self._number += 1
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, shape, dtype, size in self._shards[self._number]:
            header[name] = {
                "dtype": _DTYPES[dtype], "shape": list(shape),
                "data_offsets": [offset, offset + size],
            }  # fmt: skip
            offset += size
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._file = (self.folder / self._names[self._number]).open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._left = offset

    def _finish_file(self) -> None:
        if self._file is None:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._file.close()
        self._file = None

    def close(self) -> None:
        assert self._left == 0 and self._number == len(self._shards) - 1, "tensors are missing"
        self._finish_file()
        if len(self._shards) > 1:
            weights = {
                name: self._names[i] for i, shard in enumerate(self._shards) for name, *_ in shard
            }
            total = sum(size for shard in self._shards for *_, size in shard)
            index = {"metadata": {"total_size": total}, "weight_map": weights}
            path = self.folder / "model.safetensors.index.json"
            path.write_text(json.dumps(index, indent=1), "utf-8")


def local_folder(path: str, revision: str | None) -> Path:
    """The folder of a hub model's safetensors and configuration, fetched if need be."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            path, revision=revision, allow_patterns=["*.safetensors", "*.json"]
        )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"model.path: {path} could not be fetched ({reason}); check the name, the network, and "
            "HF_HUB_OFFLINE; or give a local folder"
        ) from error
    return Path(found)
