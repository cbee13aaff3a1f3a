"""Pieces with two extents each: a step writes the one that the last commit does not hold.

Every step changes every trained piece anyway, so writing it to the other extent costs no byte more
than overwriting it would; it costs room. Until the manifest is replaced, the last committed step is
whole on disk: a process killed at any instant goes on from it, and a step can be taken back by
forgetting it (`rollback`).

    commit: wait for writes, fdatasync, manifest to a temp file, fsync, rename, fsync of the folder

The manifest holds the step, which extent of each piece is the current one, a crc32 of each unit,
and the trainer's state (data cursor, schedule, callbacks); a SHA-256 guards it itself. Checksums
are verified when a run resumes. A piece with one extent is written in place: frozen weights, and
host memory, which no crash survives.
"""

import hashlib
import io as bytesio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mnemic.train.checkpoint import write_atomic
from mnemic.train.errors import UserError
from mnemic.train.offload.io import UNIT, Io, Transfer, Unit
from mnemic.train.offload.memory import ALIGN, aligned_buffer, round_up
from mnemic.train.offload.work import MANIFEST, name_all

FORMAT = 1
_MAGIC = b"mnemic-offload\n"
_NONE = -1  # no extent written yet: the piece reads as zeros


@dataclass(frozen=True, slots=True)
class Piece:
    """What moves as one: `nbytes` long, in one or two extents. `shown` names it in messages."""

    name: str
    nbytes: int
    copies: int = 2

    @property
    def padded(self) -> int:
        return round_up(self.nbytes)


class Plan:
    """Where each unit of each piece lies: a function of the pieces and the number of directories.

    Units go to the directories in turn, so a large piece is read from all disks at once.
    """

    def __init__(self, pieces: Sequence[Piece], directories: int = 1) -> None:
        self.pieces = {piece.name: piece for piece in pieces}
        assert len(self.pieces) == len(pieces), "piece names are unique"
        self.sizes = [0] * directories
        self.units: dict[str, list[list[Unit]]] = {}
        turn = 0
        for piece in pieces:
            extents: list[list[Unit]] = [[] for _ in range(piece.copies)]
            for start in range(0, piece.padded, UNIT):
                length = min(UNIT, piece.padded - start)
                for extent in extents:
                    extent.append(Unit(turn, self.sizes[turn], length))
                    self.sizes[turn] += length
                turn = (turn + 1) % directories
            self.units[piece.name] = extents

    def digest(self) -> str:
        text = [(p.name, p.nbytes, p.copies) for p in self.pieces.values()]
        return hashlib.sha256(repr((text, self.sizes)).encode()).hexdigest()


class Store:
    """Reads and writes pieces, and commits. `folder` is where the manifest lies; None: no commits
    (host memory).
    """

    def __init__(self, plan: Plan, io: Io, folder: Path | None) -> None:
        self.plan, self.io, self.folder = plan, io, folder
        self.current = dict.fromkeys(plan.pieces, _NONE)
        self.committed = dict(self.current)
        self.checksums: dict[str, list[int]] = {}
        self._committed_checksums: dict[str, list[int]] = {}
        self._writing: dict[str, Transfer] = {}

    def written(self, name: str) -> bool:
        """Whether the piece has ever been written; one that has not is all zeros."""
        return self.current[name] != _NONE

    def read(self, name: str, buffer: Tensor, after: Sequence[Transfer] = ()) -> Transfer:
        """Fill `buffer` with the newest content, committed or not."""
        assert self.written(name), name
        pending = self._writing.get(name)
        waits = [*after, pending] if pending and not pending.done else after
        return self.io.read(self._units(name), buffer, name, waits)

    def read_span(self, name: str, start: int, buffer: Tensor) -> Transfer:
        """Fill `buffer`, whole pages, from byte `start` (a multiple of 4096) of the piece on."""
        assert self.written(name) and start % ALIGN == 0
        pending = self._writing.get(name)
        waits = [pending] if pending and not pending.done else []
        units, at, stop = [], 0, start + buffer.numel()
        for unit in self._units(name):
            low, high = max(start, at), min(stop, at + unit.length)
            if low < high:
                units.append(Unit(unit.directory, unit.offset + low - at, high - low))
            at += unit.length
        return self.io.read(units, buffer, name, waits)

    def _units(self, name: str) -> list[Unit]:
        return self.plan.units[name][self.current[name]]

    def write(self, name: str, buffer: Tensor) -> Transfer:
        """Write `buffer` to the extent that is not committed, and make it the current one."""
        earlier = self._writing.pop(name, None)
        if earlier:
            self._settle(name, earlier)
        target = 0
        if self.plan.pieces[name].copies == 2:
            target = 1 - self.committed[name] if self.committed[name] != _NONE else 0
        self.current[name] = target
        transfer = self.io.write(self.plan.units[name][target], buffer, name)
        self._writing[name] = transfer
        return transfer

    def _settle(self, name: str, transfer: Transfer) -> None:
        self.checksums[name] = transfer.wait()

    def flush(self) -> None:
        """Wait for all writes."""
        for name, transfer in self._writing.items():
            self._settle(name, transfer)
        self._writing.clear()

    def commit(self, step: int, state: dict[str, Any]) -> None:
        """Make everything written so far the state to resume from."""
        start = time.perf_counter()
        self.flush()
        if self.io.trace:
            self.io.trace.add("wait", "commit", start)
        if self.folder is not None:
            names = list(self.plan.pieces)
            payload = bytesio.BytesIO()
            torch.save(
                {
                    "format": FORMAT, "step": step, "plan": self.plan.digest(),
                    "current": [self.current[name] for name in names],
                    "crc32": [self.checksums.get(name, []) for name in names],
                    "state": state,
                },
                payload,
            )  # fmt: skip
            data = payload.getvalue()
            try:
                self.io.sync()
                write_atomic(self.folder / MANIFEST, _MAGIC + hashlib.sha256(data).digest() + data)
            except FileNotFoundError as error:
                raise UserError(
                    f"offload: step {step} could not be committed to {self.folder}: "
                    f"{error.filename} was deleted under the run; run the same command again: "
                    "with the folder gone it goes on from the newest of checkpoints/"
                ) from error
            except OSError as error:
                raise UserError(
                    f"offload: step {step} could not be committed to {self.folder}: "
                    f"{error.strerror}; what was committed before is whole: make room, and run "
                    "the same command again"
                ) from error
        self.committed = dict(self.current)
        self._committed_checksums = dict(self.checksums)

    def rollback(self) -> None:
        """Forget everything written since the last commit."""
        self.flush()
        assert all(p.copies == 2 for p in self.plan.pieces.values()
                   if self.current[p.name] != self.committed[p.name])  # fmt: skip
        self.current = dict(self.committed)
        self.checksums = dict(self._committed_checksums)

    def open(self) -> dict[str, Any] | None:
        """Take up the last commit, after checking every unit of it; its step and state, or None."""
        found = read_manifest(self.folder, self._folders()) if self.folder else None
        if found is None:
            return None
        if found["plan"] != self.plan.digest():
            raise UserError(
                f"offload: {self.folder} holds a model or optimizer of another shape; choose "
                "another run_dir or offload.path, or delete that folder"
            )
        self.current = dict(zip(self.plan.pieces, found["current"], strict=True))
        sums = zip(self.plan.pieces, found["crc32"], strict=True)
        self.checksums = {name: crc for name, crc in sums if crc}
        self.committed = dict(self.current)
        self._committed_checksums = dict(self.checksums)
        self.verify(found["step"])
        return found

    def spare(self) -> None:
        """Before content that comes from elsewhere is written: keep the extents of the last
        commit, damaged or not, from being written over until the next one.
        """
        try:
            found = read_manifest(self.folder) if self.folder else None
        except UserError:
            return  # which extents those are is what is damaged
        if found is not None and found["plan"] == self.plan.digest():
            self.committed = dict(zip(self.plan.pieces, found["current"], strict=True))

    def verify(self, step: int) -> None:
        """Compare every current unit with its checksum; `UserError` names the first bad one."""
        buffers = [aligned_buffer(UNIT), aligned_buffer(UNIT)]
        pending: list[tuple[str, Unit, int, Transfer]] = []

        def check(name: str, unit: Unit, expected: int, transfer: Transfer) -> None:
            self.check(name, unit, expected, transfer, f"of the commit of step {step}")

        for index, (name, unit, expected) in enumerate(self._sums()):
            if len(pending) == len(buffers):
                check(*pending.pop(0))
            buffer = buffers[index % 2][: unit.length]
            pending.append((name, unit, expected, self.io.read([unit], buffer, checksum=True)))
        for item in pending:
            check(*item)

    def check(
        self, name: str, unit: Unit, expected: int, transfer: Transfer, whose: str
    ) -> None:  # fmt: skip
        """Wait for a unit that is read with its checksum; `UserError` if that is another one."""
        if transfer.wait() != [expected]:
            path, advice = self.io.backends[unit.directory].path, "check the machine's memory"
            if self.folder is not None:
                advice = (
                    f"delete {name_all(self._folders())} to go on from the newest of checkpoints/, "
                    "or start in another run_dir"
                )
            raise UserError(
                f"offload: {name} is damaged ({path}, {unit.length:,} bytes from "
                f"{unit.offset:,}): its checksum is not that {whose}; {advice}"
            )

    def _sums(self) -> Iterator[tuple[str, Unit, int]]:
        for name, sums in self.checksums.items():
            for unit, expected in zip(self._units(name), sums, strict=True):
                yield name, unit, expected

    def _folders(self) -> list[Path]:
        return [Path(backend.path).parent for backend in self.io.backends]

    def close(self) -> None:
        self.io.close()


def read_manifest(folder: Path, folders: Sequence[Path] = ()) -> dict[str, Any] | None:
    """The last commit in `folder`, None where there is none; a damaged one is a `UserError`, which
    says to delete all of `folders`.
    """
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    head = len(_MAGIC)
    data = raw[head + 32 :]
    if raw[:head] != _MAGIC or hashlib.sha256(data).digest() != raw[head : head + 32]:
        raise UserError(
            f"{path}: damaged; delete {name_all(folders or [folder])} to go on from the newest of "
            "checkpoints/, or start in another run_dir"
        )
    found = torch.load(bytesio.BytesIO(data), map_location="cpu", weights_only=True)
    if found["format"] != FORMAT:
        raise UserError(f"{path}: format {found['format']}, this version reads {FORMAT}")
    return found
