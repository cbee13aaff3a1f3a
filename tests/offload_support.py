"""What tests of the offload engine share: stores of random bytes, file systems of a chosen kind."""

import shutil
import subprocess
import threading
from contextlib import contextmanager

import pytest
import torch

from mnemic.train.offload.files import HostMemory, SsdFile
from mnemic.train.offload.io import Io
from mnemic.train.offload.memory import ALIGN, aligned_buffer
from mnemic.train.offload.store import Piece, Plan, Store

PIECES = [Piece("a", 3 * ALIGN), Piece("b", 5000), Piece("frozen", 9000, copies=1)]


def content(piece, seed):
    """Random bytes for a piece, padding included."""
    buffer = aligned_buffer(piece.nbytes)
    generator = torch.Generator().manual_seed(seed)
    return buffer.copy_(torch.randint(0, 256, buffer.shape, generator=generator))


def make(folder, pieces=PIECES, directories=1, direct=True):
    """A store over files of `folder`, as an engine makes it."""
    plan = Plan(pieces, directories)
    places = [folder / str(i) for i in range(directories)]
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
    files = [
        SsdFile(place / "data.bin", size, direct=direct)
        for place, size in zip(places, plan.sizes, strict=True)
    ]
    return Store(plan, Io(files), places[0])


def put(store, name, seed):
    data = content(store.plan.pieces[name], seed)
    store.write(name, data).wait()
    return data


def get(store, name):
    buffer = aligned_buffer(store.plan.pieces[name].padded)
    store.read(name, buffer).wait()
    return buffer


def raw(store, unit):
    """What lies in a unit, read past the store."""
    with open(store.io.backends[unit.directory].path, "rb") as file:
        file.seek(unit.offset)
        return file.read(unit.length)


def flip(store, unit, at):
    with open(store.io.backends[unit.directory].path, "rb+") as file:
        file.seek(unit.offset + at)
        byte = file.read(1)[0]
        file.seek(unit.offset + at)
        file.write(bytes([byte ^ 1]))


class Gated(HostMemory):
    """Host memory whose reads and writes wait until they may."""

    def __init__(self, nbytes):
        super().__init__(nbytes)
        self.reads, self.writes = threading.Event(), threading.Event()
        self.reads.set()
        self.writes.set()

    def read(self, offset, view):
        assert self.reads.wait(20)
        super().read(offset, view)

    def write(self, offset, view):
        assert self.writes.wait(20)
        super().write(offset, view)


@contextmanager
def mounting(folder):
    """Gives mount(name, options, kind="tmpfs", source="tmpfs"), which makes `folder/name` a file
    system of its own; a test that may not mount (needs root) is skipped.
    """
    mounts = []

    def mount(name, options, kind="tmpfs", source="tmpfs"):
        place = folder / name
        place.mkdir()
        command = ["mount", "-t", kind, "-o", options, str(source), str(place)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip(f"mounting {kind} needs root")
        mounts.append(place)
        return place

    try:
        yield mount
    finally:
        for place in mounts:
            # Of a test that failed, files may still be open.
            subprocess.run(["umount", "-l", str(place)], check=True)
