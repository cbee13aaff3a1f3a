"""Tensors set aside between forward and backward: in host memory beside an accelerator, or in a
file that grows.

A place has five methods. `put(data)` takes the bytes of a storage (1-D uint8) and returns a ticket;
`begin(ticket)` starts to fetch them; `get(ticket, device)` gives them back, once; `drop(ticket)`
gives them up; `close` ends it all. They are called by one thread at a time.
"""

import os
import tempfile
import time
from bisect import bisect
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mnemic.train.errors import UserError
from mnemic.train.offload.files import SsdFile
from mnemic.train.offload.io import UNIT, Trace
from mnemic.train.offload.memory import ALIGN, aligned_buffer, bytes_of, round_up

BUFFERS = 4
"""Buffers of `UNIT` bytes through which tensors are written. All of them full: `put` waits."""
AHEAD = 2
"""How many tensors a reader of a place begins to fetch before their turn."""


@dataclass(frozen=True, slots=True)
class View:
    """A tensor as a view of its storage, to make the same view of a copy: no stride is lost."""

    device: torch.device
    dtype: torch.dtype
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]

    @staticmethod
    def of(tensor: Tensor) -> "View":
        offset = int(tensor.storage_offset())
        return View(tensor.device, tensor.dtype, offset, tensor.shape, tensor.stride())

    def over(self, data: Tensor) -> Tensor:
        """The view of `data`, which begins where its storage does."""
        made = torch.empty(0, dtype=self.dtype, device=data.device)
        return made.set_(data.untyped_storage(), self.offset, self.shape, self.stride)


def storage_bytes(tensor: Tensor) -> Tensor:
    """All of the tensor's storage, uint8 (nbytes,), on its device, shared."""
    made = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    return made.set_(tensor.untyped_storage())


class HostCopies:
    """In host memory, for tensors of an accelerator; pinned under CUDA.

    torch's pinned allocator rounds up to powers of two, so the copies come in pieces that are one.
    It keeps freed pieces until copies from them are done. Copies are queued behind the computation
    that made their source, on its own stream.
    """

    def __init__(self, device: torch.device) -> None:
        self.pin = device.type == "cuda"

    def put(self, data: Tensor) -> list[Tensor]:
        parts = data.split(UNIT)
        pieces = [torch.empty(len(x), dtype=x.dtype, pin_memory=self.pin) for x in parts]
        for piece, part in zip(pieces, parts, strict=True):
            piece.copy_(part, non_blocking=self.pin)
        return pieces

    def begin(self, ticket: Any) -> None:
        """Nothing is gained: the copy back is queued in no time."""

    def get(self, ticket: list[Tensor], device: torch.device) -> Tensor:
        size = sum(len(piece) for piece in ticket)
        data = torch.empty(size, dtype=torch.uint8, device=device)
        for piece, part in zip(ticket, data.split(UNIT), strict=True):
            part.copy_(piece, non_blocking=self.pin)
        return data

    def drop(self, ticket: Any) -> None:
        """The last reference to the ticket frees it."""

    def close(self) -> None:
        """Nothing is open."""


@dataclass(slots=True, eq=False)
class Ticket:
    """A stretch of the file, and what is under way to or from it."""

    offset: int
    nbytes: int
    writes: "list[Future[None]]"
    landing: Tensor | None = None
    read: "Future[None] | None" = None

    @property
    def end(self) -> int:
        return self.offset + _length(self.nbytes)


def _length(nbytes: int) -> int:
    return max(ALIGN, round_up(nbytes))


class Scratch:
    """In a file of `folder` that has no name, so that nothing of it outlives the process however
    that ends, and processes that share a folder stay apart.

    Written through a few page-aligned buffers (torch's memory is not aligned for O_DIRECT), read
    into memory of exact size that the tensor then owns. A thread each way, as in io.py, without its
    checksums: what is lost here costs a step. Stretches are reused, first fit, and blocks reserved
    as the file grows, so a full disk shows before anything is written.
    """

    def __init__(
        self, folder: Path, device: torch.device, *, direct: bool = True, trace: Trace | None = None
    ) -> None:
        self.folder, self.pin, self.trace = folder, device.type == "cuda", trace
        self.written_bytes = self.read_bytes = self.file_bytes = 0
        self._file = _nameless(folder, direct)
        self._free: list[tuple[int, int]] = []  # (offset, length), in order, none touching another
        self._dropped: deque[Ticket] = deque()
        self._bounce: deque[tuple[Tensor, Future[None]]] = deque()
        self._reader = ThreadPoolExecutor(1, "mnemic-read")
        self._writer = ThreadPoolExecutor(1, "mnemic-write")
        self._closed = False

    def put(self, data: Tensor) -> Ticket:
        while self._dropped:
            self._release(self._dropped.popleft())
        ticket = Ticket(self._take(_length(data.numel())), data.numel(), [])
        for start in range(0, data.numel(), UNIT):
            part = data[start : start + UNIT]
            buffer = self._buffer()
            buffer[: len(part)].copy_(part)
            view = bytes_of(buffer[: round_up(len(part))])
            future = self._writer.submit(self._move, "write", ticket.offset + start, view)
            self._bounce.append((buffer, future))
            ticket.writes.append(future)
            self.written_bytes += len(view)
        return ticket

    def begin(self, ticket: Ticket) -> None:
        if ticket.read is None:
            ticket.landing = aligned_buffer(ticket.nbytes)
            view = bytes_of(ticket.landing)
            ticket.read = self._reader.submit(self._fetch, ticket.offset, view, ticket.writes)
            self.read_bytes += len(view)

    def get(self, ticket: Ticket, device: torch.device) -> Tensor:
        self.begin(ticket)
        assert ticket.read is not None and ticket.landing is not None
        self._result(ticket.read)
        self._release(ticket)
        data, ticket.landing = ticket.landing[: ticket.nbytes], None
        return data.to(device)

    def drop(self, ticket: Ticket) -> None:
        # The garbage collector may call this in the middle of anything: only note it.
        self._dropped.append(ticket)

    def close(self) -> None:
        """Finish what is under way; the file is gone with its descriptor."""
        if self._closed:
            return
        self._closed = True
        for pool in (self._reader, self._writer):
            pool.shutdown(wait=True, cancel_futures=True)
        self._file.close()

    def _buffer(self) -> Tensor:
        if len(self._bounce) < BUFFERS:
            return aligned_buffer(UNIT, pin=self.pin)
        buffer, future = self._bounce.popleft()
        self._result(future)
        return buffer

    def _move(self, lane: str, offset: int, view: memoryview) -> None:
        start = time.perf_counter()
        (self._file.read if lane == "read" else self._file.write)(offset, view)
        if self.trace:
            self.trace.add(lane, "activations", start, len(view))

    def _fetch(self, offset: int, view: memoryview, writes: "list[Future[None]]") -> None:
        # Writers never wait for readers, so this cannot hang.
        for write in writes:
            write.result()
        self._move("read", offset, view)

    def _result(self, future: "Future[None]") -> None:
        try:
            future.result()
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError, wanted: str = "") -> UserError:
        return UserError(
            f"offload.activations=ssd: the file in {self.folder} failed: {error.strerror}{wanted}; "
            "what is saved of the run is whole: make room or mend the disk, and run the same "
            "command again; a new run may set offload.path to a folder on another disk"
        )

    def _take(self, length: int) -> int:
        """Offset of a stretch that is now in use. A dropped one may still be read: nobody looks at
        what was read then.
        """
        for index, (offset, size) in enumerate(self._free):
            if size >= length:
                self._free[index : index + 1] = (
                    [(offset + length, size - length)] if size > length else []
                )
                return offset
        end = self.file_bytes
        if self._free and sum(self._free[-1]) == end:
            end = self._free[-1][0]
        try:
            self._file.grow(self.file_bytes, end + length)
        except OSError as error:
            raise self._failed(error, f"; it needs {end + length:,} bytes") from error
        if end < self.file_bytes:
            self._free.pop()
        self.file_bytes = end + length
        return end

    def _release(self, ticket: Ticket) -> None:
        start, stop = ticket.offset, ticket.end
        at = bisect(self._free, (start, 0))
        if at < len(self._free) and self._free[at][0] == stop:
            stop = sum(self._free.pop(at))
        if at and sum(self._free[at - 1]) == start:
            at -= 1
            start = self._free.pop(at)[0]
        self._free.insert(at, (start, stop - start))


class _GrowingFile(SsdFile):
    def grow(self, old: int, new: int) -> None:
        """Reserve blocks behind the `old` bytes. Writes to those may be under way."""
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self.fd, old, new - old)
        else:
            os.ftruncate(self.fd, new)


def _nameless(folder: Path, direct: bool) -> _GrowingFile:
    try:
        handle, name = tempfile.mkstemp(prefix="activations-", suffix=".bin", dir=folder)
    except OSError as error:
        raise UserError(
            f"offload.activations=ssd: {folder} cannot be written: {error.strerror}; set "
            "offload.path to a writable folder"
        ) from error
    os.close(handle)
    try:
        return _GrowingFile(Path(name), 0, direct=direct)
    finally:
        Path(name).unlink(missing_ok=True)
