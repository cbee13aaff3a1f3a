"""Where pieces lie: one flat preallocated file for each directory, or host memory.

A backend has four methods: `read(offset, view)`, `write(offset, view)`, `sync()`, `close()`. They
block; `io.py` calls them from threads. Offsets and lengths are multiples of 4096.
"""

import errno
import os
from pathlib import Path
from typing import Protocol

from mnemic.train.checkpoint import fsync_folder
from mnemic.train.errors import UserError
from mnemic.train.offload.memory import aligned_buffer, bytes_of


class Backend(Protocol):
    path: str

    def read(self, offset: int, view: memoryview) -> None: ...

    def write(self, offset: int, view: memoryview) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


class SsdFile:
    """A file of fixed size, its blocks reserved at once; O_DIRECT where the file system takes it.

    Without O_DIRECT, pages are dropped from the page cache after use: the memory that an offloaded
    model must not take would otherwise be taken by its cache. ENOSPC is met here, not later. A file
    of another size is refused as it is: it may hold the only copy of something.

    `writable=False`: a file that is there, for reading. `reserve=False`: no blocks yet, for a file
    that will share them.
    """

    def __init__(
        self, path: Path, nbytes: int, *, direct: bool = True, writable: bool = True,
        reserve: bool = True,
    ) -> None:  # fmt: skip
        self.path, self.direct = str(path), direct and hasattr(os, "O_DIRECT")
        flags = os.O_RDWR | os.O_CREAT if writable else os.O_RDONLY
        flags |= getattr(os, "O_CLOEXEC", 0)
        try:
            self.fd = os.open(path, flags | (os.O_DIRECT if self.direct else 0), 0o644)
        except OSError as error:
            if not (self.direct and error.errno == errno.EINVAL):
                raise _unusable(path, error) from None
            self.direct = False
            self.fd = os.open(path, flags, 0o644)
        size = os.fstat(self.fd).st_size
        if size != nbytes and (size or not writable):
            os.close(self.fd)
            raise UserError(
                f"offload: {path} has {size:,} bytes where {nbytes:,} belong, so it was cut or is "
                f"of another model; delete {path.parent} to go on from the newest of checkpoints/, "
                "or start in another run_dir"
            )
        if not writable:
            return
        try:
            self._make(path, nbytes, fresh=size == 0, reserve=reserve)
        except OSError as error:
            os.close(self.fd)
            if size == 0:
                # What a full disk gave of it would only keep it full.
                path.unlink(missing_ok=True)
            raise _unusable(path, error, nbytes) from None

    def _make(self, path: Path, nbytes: int, *, fresh: bool, reserve: bool) -> None:
        if fresh:
            os.ftruncate(self.fd, nbytes)
        if nbytes and reserve and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self.fd, 0, nbytes)
        if fresh:
            fsync_folder(path.parent)

    def read(self, offset: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            count = os.preadv(self.fd, [view[done:]], offset + done)
            if count == 0:
                raise OSError(errno.EIO, "the file ends early", self.path)
            done += count
        self._forget(offset, len(view))

    def write(self, offset: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            done += os.pwritev(self.fd, [view[done:]], offset + done)
        if not self.direct:
            # Only clean pages can be dropped.
            os.fdatasync(self.fd)
            self._forget(offset, len(view))

    def _forget(self, offset: int, length: int) -> None:
        if not self.direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.fd, offset, length, os.POSIX_FADV_DONTNEED)

    def sync(self) -> None:
        if os.fstat(self.fd).st_nlink == 0:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.path)
        os.fdatasync(self.fd)

    def close(self) -> None:
        os.close(self.fd)


class HostMemory:
    """The same in RAM: for machines whose memory holds the model and whose accelerator does not."""

    path = "host memory"

    def __init__(self, nbytes: int) -> None:
        self._view = bytes_of(aligned_buffer(nbytes))

    def read(self, offset: int, view: memoryview) -> None:
        view[:] = self._view[offset : offset + len(view)]

    def write(self, offset: int, view: memoryview) -> None:
        self._view[offset : offset + len(view)] = view

    def sync(self) -> None:
        """Memory is as safe as it gets."""

    def close(self) -> None:
        self._view = memoryview(b"")


def _unusable(path: Path, error: OSError, nbytes: int = 0) -> UserError:
    wanted = f"; it needs {nbytes:,} bytes" if nbytes else ""
    return UserError(
        f"offload: {path} cannot be used: {error.strerror}{wanted}; make room, or set offload.path "
        "to a writable folder on a disk with room"
    )
