"""The folders an offloaded model lies in: found or made, locked by process, cleaned of leftovers.

In the run folder it is `offload/`. A folder given as `offload.path` gets one below it, named after
the run, with a note of whose it is; nothing else there is touched.
"""

import errno
import hashlib
import os
from pathlib import Path
from typing import Any

from mnemic.train.errors import UserError

SCRATCH = ("gradients.bin", "activations.bin", ".commit.tmp")
"""What a dead run may leave behind and no later one needs."""
OWNER = "owner"


class WorkFolders:
    """`claim` makes and locks them; `release` lets go. The first one holds the manifest."""

    def __init__(self, run: Path, given: list[str]) -> None:
        self.run = run.resolve()
        if given:
            mark = hashlib.sha256(str(self.run).encode()).hexdigest()[:8]
            self._parents = [Path(path).expanduser() for path in given]
            name = f"mnemic-{run.name}-{mark}"
            self.paths = tuple(parent / name for parent in self._parents)
        else:
            self._parents = [run]
            self.paths = (run / "offload",)
        self._locks: list[Any] = []

    def claim(self) -> None:
        """`UserError` where a folder is missing, not writable, another run's, or in use."""
        for parent in self._parents:
            if parent != self.run and not parent.is_dir() and len(self._parents) >= 1:
                if parent.resolve() == self.run:
                    parent.mkdir(parents=True, exist_ok=True)
                    continue
                raise UserError(
                    f"offload.path: {parent} is not a folder; give an existing one on a fast disk"
                )
        for path in self.paths:
            try:
                path.mkdir(exist_ok=True)
                self._lock(path)
                owner = path / OWNER
                if not owner.exists():
                    owner.write_text(str(self.run))
                elif owner.read_text() != str(self.run):
                    # A run folder that was moved keeps its own offload folder.
                    if path.parent != self.run:
                        raise UserError(
                            f"offload.path: {path} belongs to the run {owner.read_text()}; choose "
                            "another path or run_dir"
                        )
                    owner.write_text(str(self.run))
                for name in SCRATCH:
                    (path / name).unlink(missing_ok=True)
            except OSError as error:
                self.release()
                raise UserError(
                    f"offload: {path} cannot be written: {error.strerror}; set offload.path to a "
                    "writable folder"
                ) from None

    def _lock(self, path: Path) -> None:
        try:
            import fcntl
        except ImportError:  # Windows: the run folder's rule holds here too
            return
        handle = (path / "lock").open("a+")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            handle.seek(0)
            holder = handle.read().strip() or "unknown"
            handle.close()
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            self.release()
            raise UserError(
                f"offload: {path} is in use by another mnemic process (pid {holder}); wait for "
                "it, or choose another run_dir"
            ) from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        self._locks.append(handle)

    def release(self) -> None:
        for handle in self._locks:
            handle.close()
        self._locks = []
