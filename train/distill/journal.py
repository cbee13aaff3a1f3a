"""The folder of a collection: who may write to it, with which settings it was begun, and raw.jsonl,
one line for each reply of the teacher.

    collect.json    the settings           answers.sqlite  replies of an endpoint, each paid once
    raw.jsonl       append-only; the last line of a key is the one that holds
    clean/          what `clean` makes of it

A line is on disk before the next question is asked. A kill leaves at most a part of a line, which
the next start cuts off.
"""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mnemic.train.checkpoint import write_atomic
from mnemic.train.errors import UserError

log = logging.getLogger("mnemic")

FORMAT = 1
FREE = ("path", "episodes", "operations", "versions")
"""Settings that may differ when a collection goes on: they change no reply that is there."""


class CollectFolder:
    """`with folder.claimed():` before anything in it is read or written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings = path / "collect.json"
        self.raw = path / "raw.jsonl"
        self.answers = path / "answers.sqlite"
        self.clean = path / "clean"

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """The folder to this process alone. Raises `UserError` where another has it."""
        try:
            import fcntl
        except ImportError:  # Windows: two processes on one folder stay the user's care.
            yield
            return
        with (self.path / ".lock").open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                holder = lock.read().strip() or "unknown"
                raise UserError(
                    f"{self.path}: is in use by another mnemic process (pid {holder}); wait for "
                    "it, or give another folder"
                ) from None
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            yield

    def begin(self, settings: dict[str, Any]) -> None:
        """Write the settings, or compare them with those of the collection that is there.

        Raises:
            UserError: it was begun with others, or nothing says with which.
        """
        if not self.settings.exists():
            if self.raw.exists():
                raise UserError(
                    f"{self.path}: has a raw.jsonl and no collect.json that says how it was "
                    "collected; give another folder"
                )
        else:
            old = self.read_settings()
            keys = [k for k in {**old, **settings} if old.get(k) != settings.get(k)]
            keys = [k for k in keys if k not in FREE]
            if keys:
                shown = ", ".join(f"{k} {old.get(k)!r} -> {settings.get(k)!r}" for k in keys[:4])
                more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
                raise UserError(
                    f"{self.path}: was collected with other settings ({shown}{more}); give the "
                    "same ones to go on, or another folder"
                )
        write_atomic(self.settings, (json.dumps(settings, indent=1) + "\n").encode())

    def read_settings(self) -> dict[str, Any]:
        """Of a collection that has begun. Raises `UserError` where there is none."""
        if not self.settings.is_file():
            raise UserError(
                f"{self.path}: no collection (no collect.json); give the OUT of "
                "mnemic distill collect"
            )
        try:
            found = json.loads(self.settings.read_bytes())
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise UserError(f"{self.settings}: damaged; give another folder")
        if found.get("format") != FORMAT:
            raise UserError(
                f"{self.settings}: format {found.get('format')!r}, this version reads {FORMAT}; "
                "collect again into another folder"
            )
        return found

    def records(self) -> Iterator[dict[str, Any]]:
        """All lines of raw.jsonl, after a torn last one is cut off; superseded ones too.

        Raises:
            UserError: another line than the last cannot be read.
        """
        if not self.raw.exists():
            return
        repair(self.raw)
        with self.raw.open("rb") as file:
            for number, line in enumerate(file, 1):
                yield _parsed(line, f"{self.raw}, line {number}")


class Appender:
    """Whole lines at the end of a file, on disk when `append` returns."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab")

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        if records:
            self._file.write(b"".join(json.dumps(r).encode() + b"\n" for r in records))
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def repair(path: Path) -> None:
    """Cut off what a kill left of a last line: one without its end, or one that is not JSON (a
    crash of the machine may leave zeros).
    """
    with path.open("rb+") as file:
        size = file.seek(0, os.SEEK_END)
        last = _last_line(file, size)
        if not last or (last.endswith(b"\n") and _is_record(last)):
            return
        file.truncate(size - len(last))
        file.flush()
        os.fsync(file.fileno())
    log.info("%s: a torn last line of %d bytes was cut off", path, len(last))


def _last_line(file: Any, size: int) -> bytes:
    """With its line break, where it has one."""
    step, tail = 1 << 16, b""
    while True:
        start = max(0, size - step)
        file.seek(start)
        tail = file.read(size - start)
        cut = tail.rfind(b"\n", 0, len(tail) - 1)
        if cut >= 0:
            return tail[cut + 1 :]
        if start == 0:
            return tail
        step *= 4


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
        if all(isinstance(found[k], str) for k in ("key", "operation", "reply", "split_key")):
            return found
    except (ValueError, KeyError, TypeError):
        found = None
    raise UserError(
        f"{where}: no record of a reply; the file was edited or damaged: remove that line, or "
        "collect again into another folder"
    )
