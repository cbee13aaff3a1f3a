"""Asynchronous transfers between buffers and backends, by threads: reads and writes apart.

One thread each way and directory saturates a disk with requests of a mebibyte and more (measured:
io_uring and libaio gain nothing here), and python gives up its lock during preadv, pwritev and
crc32. Checksums are taken on the way, in the same threads.
"""

import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from mnemic.train.errors import UserError
from mnemic.train.offload.files import Backend
from mnemic.train.offload.memory import bytes_of

UNIT = 8 << 20
"""Longest request, bytes; also what one checksum covers and one directory of several holds."""


@dataclass(frozen=True, slots=True)
class Unit:
    """A stretch of a piece: where it lies (`directory`, `offset`) and its `length`."""

    directory: int
    offset: int
    length: int


@dataclass(slots=True)
class Transfer:
    """A piece on its way. `wait` returns the checksums of its units, or raises what went wrong."""

    futures: list["Future[int]"]

    def wait(self) -> list[int]:
        try:
            return [future.result() for future in self.futures]
        except OSError as error:
            raise UserError(
                f"offload: {error.filename}: {error.strerror}; nothing of the last commit was "
                "written over: mend the disk, or make room, and run the same command again"
            ) from error

    @property
    def done(self) -> bool:
        return all(future.done() for future in self.futures)


@dataclass
class Trace:
    """Who was busy when, for the timeline picture: (lane, name, start, end, bytes), seconds."""

    rows: list[tuple[str, str, float, float, int]] = field(default_factory=list)

    def add(self, lane: str, name: str, start: float, nbytes: int = 0) -> None:
        self.rows.append((lane, name, start, time.perf_counter(), nbytes))


@contextmanager
def _naming(backend: Backend) -> Iterator[None]:
    """Calls on a descriptor do not say of which file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or backend.path
        raise


class Io:
    """Threads over the backends of all directories. Counts the bytes it moves."""

    def __init__(self, backends: Sequence[Backend], trace: Trace | None = None) -> None:
        self.backends, self.trace = backends, trace
        self.read_bytes = self.written_bytes = 0
        self._readers = [ThreadPoolExecutor(1, "mnemic-read") for _ in backends]
        self._writers = [ThreadPoolExecutor(1, "mnemic-write") for _ in backends]

    def read(
        self, units: Sequence[Unit], buffer: Tensor, name: str = "",
        after: Sequence[Transfer] = (), checksum: bool = False,
    ) -> Transfer:  # fmt: skip
        """Fill `buffer` (uint8, page-aligned) from `units`, once the transfers `after` are done."""
        self.read_bytes += sum(unit.length for unit in units)
        futures, start = [], 0
        view = bytes_of(buffer)
        for unit in units:
            part = view[start : start + unit.length]
            start += unit.length
            pool = self._readers[unit.directory]
            futures.append(pool.submit(self._read, unit, part, name, tuple(after), checksum))
        return Transfer(futures)

    def write(self, units: Sequence[Unit], buffer: Tensor, name: str = "") -> Transfer:
        """Write `buffer` to `units`; it must stay as it is until the transfer is done."""
        self.written_bytes += sum(unit.length for unit in units)
        futures, start = [], 0
        view = bytes_of(buffer)
        for unit in units:
            part = view[start : start + unit.length]
            start += unit.length
            futures.append(self._writers[unit.directory].submit(self._write, unit, part, name))
        return Transfer(futures)

    def _read(
        self, unit: Unit, view: memoryview, name: str, after: Sequence[Transfer], checksum: bool
    ) -> int:
        # Writers never wait for readers, so this cannot hang.
        for transfer in after:
            transfer.wait()
        start = time.perf_counter()
        backend = self.backends[unit.directory]
        with _naming(backend):
            backend.read(unit.offset, view)
        if self.trace:
            self.trace.add("read", name, start, unit.length)
        return zlib.crc32(view) if checksum else 0

    def _write(self, unit: Unit, view: memoryview, name: str) -> int:
        start = time.perf_counter()
        backend = self.backends[unit.directory]
        with _naming(backend):
            backend.write(unit.offset, view)
        if self.trace:
            self.trace.add("write", name, start, unit.length)
        return zlib.crc32(view)

    def sync(self) -> None:
        for backend in self.backends:
            with _naming(backend):
                backend.sync()

    def close(self) -> None:
        """Finish what is under way, then close the backends."""
        for pool in (*self._readers, *self._writers):
            pool.shutdown(wait=True)
        for backend in self.backends:
            backend.close()
