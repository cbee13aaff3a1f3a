"""The store as one file in a checkpoint folder, and back: a copy, shared blocks where the file
system can (reflink: Btrfs, XFS), a unit at a time, and back a piece at a time.

`offload.bin` holds the current extent of each piece, one after the other: a store of one extent a
piece, which a model can also be run from.
"""

import fcntl
import struct
from pathlib import Path
from typing import Any

import torch

from mnemic.train.errors import UserError
from mnemic.train.offload.files import SsdFile
from mnemic.train.offload.io import UNIT, Io
from mnemic.train.offload.memory import aligned_buffer, bytes_of
from mnemic.train.offload.store import Piece, Plan, Store

DATA, INDEX = "offload.bin", "offload.pt"
_FICLONERANGE = 0x4020940D


def single(plan: Plan) -> Plan:
    return Plan([Piece(p.name, p.nbytes, 1) for p in plan.pieces.values()])


def save_store(store: Store, folder: Path) -> None:
    """Write `offload.bin` and `offload.pt` (which pieces are in it, their checksums)."""
    store.flush()
    plan = single(store.plan)
    target = SsdFile(folder / DATA, plan.sizes[0], reserve=False)
    try:
        buffer = aligned_buffer(UNIT)
        for name in plan.pieces:
            if not store.written(name):
                continue
            source = store.plan.units[name][store.current[name]]
            sums = store.checksums[name]
            for unit, to, expected in zip(source, plan.units[name][0], sums, strict=True):
                backend = store.io.backends[unit.directory]
                if _clone(backend, unit.offset, unit.length, target, to.offset):
                    continue
                part = buffer[: unit.length]
                reading = store.io.read([unit], part, checksum=True)
                store.check(name, unit, expected, reading, "of what was written there")
                target.write(to.offset, bytes_of(part))
        target.sync()
    finally:
        target.close()
    torch.save(
        {
            "plan": plan.digest(), "written": [n for n in plan.pieces if store.written(n)],
            "crc32": store.checksums,
        },
        folder / INDEX,
    )  # fmt: skip


def _clone(backend: Any, offset: int, length: int, target: SsdFile, to: int) -> bool:
    """Share blocks with the target; False where the file system does not."""
    fd = getattr(backend, "fd", None)
    if fd is None:
        return False
    try:
        request = struct.pack("qQQQ", fd, offset, length, to)
        fcntl.ioctl(target.fd, _FICLONERANGE, request)
    except OSError:
        return False
    return True


def open_copy(folder: Path, plan: Plan, *, trace: Any = None) -> Store:
    """The copy as a store to read from. `plan` is that of the store it was made of."""
    flat = single(plan)
    found = _index(folder, flat)
    file = SsdFile(folder / DATA, flat.sizes[0], writable=False)
    store = Store(flat, Io([file], trace), None)
    _take(store, found)
    return store


def adopt(store: Store, folder: Path) -> None:
    """Let a store over the copy's file know what the copy holds."""
    _take(store, _index(folder, store.plan))


def _index(folder: Path, plan: Plan) -> dict[str, Any]:
    found = torch.load(folder / INDEX, map_location="cpu", weights_only=True)
    if found["plan"] != plan.digest():
        raise UserError(
            f"{folder}: holds a model or optimizer of another shape; resume with the recipe that "
            "wrote it"
        )
    return found


def _take(store: Store, found: dict[str, Any]) -> None:
    store.current |= dict.fromkeys(found["written"], 0)
    store.committed = dict(store.current)
    store.checksums = dict(found["crc32"])


def restore_store(store: Store, folder: Path) -> None:
    """Copy a checkpoint into `store`; what it does not hold becomes zeros."""
    source = open_copy(folder, store.plan)
    store.flush()
    try:
        for name in store.plan.pieces:
            if not source.written(name):
                store.current[name] = -1
                store.checksums.pop(name, None)
                continue
            buffer = aligned_buffer(store.plan.pieces[name].padded)
            source.read(name, buffer).wait()
            if store.write(name, buffer).wait() != source.checksums[name]:
                raise UserError(
                    f"{folder / DATA}: {name} is damaged, its checksum is not that of what was "
                    "written; resume from another checkpoint by loop.resume"
                )
        store.flush()
    finally:
        source.close()
