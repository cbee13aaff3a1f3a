"""The folders an offloaded model lies in: found or made, locked by process, cleaned of leftovers.

In the run folder it is `offload/`. A folder given as `offload.path` gets one below it, named after
the run, with a note of whose it is; nothing else there is touched.
"""

import errno
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mnemic.train.checkpoint import fsync_folder, write_atomic
from mnemic.train.errors import UserError
from mnemic.train.recipe.recipe import Recipe

DATA, MANIFEST, OWNER = "data.bin", "commit", "owner"
SCRATCH = ("gradients.bin", "activations*.bin", ".commit.tmp", ".owner.tmp")
"""What a dead run may leave behind and no later one needs."""


def work_folders(recipe: Recipe, run: Path) -> "WorkFolders":
    """Where a streamed run's files lie."""
    given = recipe.offload.path
    return WorkFolders(run, [given] if isinstance(given, str) else given or [])


def name_all(paths: Iterable[Path]) -> str:
    return " and ".join(dict.fromkeys(map(str, paths)))


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
        seen: set[Path] = set()
        for parent in self._parents:
            if parent.resolve() == self.run:
                parent.mkdir(parents=True, exist_ok=True)
            if not parent.is_dir():
                raise UserError(
                    f"offload.path: {parent} is not a folder; give an existing one on a fast disk"
                )
            if parent.resolve() in seen:
                raise UserError(
                    f"offload.path: {parent} is given twice; give each disk's folder once"
                )
            seen.add(parent.resolve())
        for path in self.paths:
            try:
                path.mkdir(exist_ok=True)
                self._lock(path)
                self._own(path)
                for file in [file for pattern in SCRATCH for file in path.glob(pattern)]:
                    file.unlink(missing_ok=True)
            except OSError as error:
                self.release()
                raise UserError(
                    f"offload: {path} cannot be written: {error.strerror}; set offload.path to a "
                    "writable folder"
                ) from None
        self._check_whole()

    def _check_whole(self) -> None:
        """Files of all folders, or of none: one without the others may be on a disk that is not
        mounted. The first one is made first.
        """
        missing = [path for path in self.paths if not (path / DATA).exists()]
        held = [path for path in self.paths if path not in missing]
        committed = (self.paths[0] / MANIFEST).exists()
        if missing and (committed or (held and self.paths[0] in missing)):
            raise UserError(
                f"offload: {missing[0] / DATA} is missing, and the model is not whole without it; "
                "bring it back (is its disk mounted?), or delete "
                f"{name_all(self.paths)} to go on from the newest of checkpoints/"
            )
        if not committed:
            # Of a run that died before its first commit: not all of the model is in them.
            for path in held:
                (path / DATA).unlink()

    def _own(self, path: Path) -> None:
        """Note whose the folder is."""
        note, mine = path / OWNER, os.fsencode(self.run)
        owner = note.read_bytes() if note.exists() else b""
        # A run folder that was moved keeps its own offload folder.
        if owner and owner != mine and path.parent.resolve() != self.run:
            raise UserError(
                f"offload.path: {path} belongs to the run {os.fsdecode(owner)}; choose another "
                "path or run_dir"
            )
        if owner != mine:
            write_atomic(note, mine)
            fsync_folder(path.parent)

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
