"""Checkpoints that no crash can tear: temp folder, fsync, manifest with checksums, rename, fsync.

    checkpoints/step-00000040/manifest.json       format, step, engine, number of ranks, sha256 and
                                                  bytes of each file
                             model.safetensors    trained weights (a frozen base is not copied)
                             sharded/             in its place under FSDP2: weights and optimizer
                                                  state, each rank's rows in a file (sharded.py)
                             accelerate/          in its place under DeepSpeed: the engine's own
                             trainer.pt           all other state; read with weights_only=True

The folder's name appears only when everything in it is on disk.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any, NoReturn

from mnemic.train.errors import UserError

log = logging.getLogger("mnemic")

FORMAT = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d{8})")


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def checkpoint_step(path: Path) -> int:
    """The step that a checkpoint's folder is named after; -1 for another folder."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path), oldest first. Unfinished temp folders are not checkpoints."""
    if not folder.is_dir():
        return []
    found = [(m, p) for p in folder.iterdir() if (m := _NAME.fullmatch(p.name))]
    return sorted((int(match[1]), path) for match, path in found)


def fsync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes) -> None:
    """Replace a small file so that a reader, or a crash, sees the old bytes or the new ones."""
    temp = path.with_name(f".{path.name}.tmp")
    with temp.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temp, path)
    fsync_folder(path.parent)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


class CheckpointWriter:
    """`with CheckpointWriter(folder, step) as temp:` fill the temp folder; leaving the block
    commits it.

    An exception inside, or a failed commit, removes the temp folder and raises one `UserError`.
    `needed_bytes` is compared with the free space first, so that a full disk is found before
    writing.
    """

    def __init__(
        self, folder: Path, step: int, *, needed_bytes: int = 0, engine: str | None = None,
        ranks: int = 1,
    ) -> None:  # fmt: skip
        self.folder, self.step, self.needed_bytes = folder, step, needed_bytes
        self.engine, self.ranks = engine, ranks
        self.final = folder / checkpoint_name(step)
        self.temp = folder / f".tmp-{self.final.name}"

    def __enter__(self) -> Path:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            sweep(self.folder)
            free = shutil.disk_usage(self.folder).free
            if free < self.needed_bytes:
                text = f"No space left: it needs {self.needed_bytes:,} bytes, {free:,} are free"
                raise OSError(errno.ENOSPC, text)
            self.temp.mkdir()
        except OSError as error:
            self._fail(error)
        return self.temp

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            try:
                self._commit()
            except OSError as failure:
                self._fail(failure)
        elif isinstance(error, Exception):
            # safetensors and torch raise types of their own for a failed write.
            self._fail(error)

    def _commit(self) -> None:
        files = {}
        for path in sorted(p for p in self.temp.rglob("*") if p.is_file()):
            with path.open("rb+") as file:
                os.fsync(file.fileno())
            name = str(path.relative_to(self.temp))
            files[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        manifest = {
            "format": FORMAT, "step": self.step, "engine": self.engine, "ranks": self.ranks,
            "files": files,
        }  # fmt: skip
        write_atomic(self.temp / MANIFEST, json.dumps(manifest, indent=1).encode())
        if self.final.exists():
            os.rename(self.final, self.folder / f".tmp-old-{self.final.name}")
        os.rename(self.temp, self.final)
        fsync_folder(self.folder)
        sweep(self.folder)

    def _fail(self, error: Exception) -> NoReturn:
        shutil.rmtree(self.temp, ignore_errors=True)
        kept = [path.name for _, path in list_checkpoints(self.folder)]
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        intact = f"intact on disk: {', '.join(kept)}" if kept else "none was written before"
        raise UserError(
            f"the checkpoint of step {self.step} could not be written to {self.folder}: {reason} "
            f"({intact}); make room or choose another run_dir, then run the same command again"
        ) from error


def discard(path: Path) -> None:
    """Delete a checkpoint so that a crash half-way leaves no folder that looks like one."""
    trash = path.with_name(f".tmp-old-{path.name}")
    shutil.rmtree(trash, ignore_errors=True)
    os.rename(path, trash)
    shutil.rmtree(trash)


def sweep(folder: Path) -> None:
    """Remove what an interrupted save or deletion left."""
    for path in folder.glob(".tmp-*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def prune(folder: Path, keep: int, protect: set[int]) -> None:
    """Delete all but the newest `keep` checkpoints and the protected steps."""
    found = list_checkpoints(folder)
    for step, path in found[: max(0, len(found) - keep)]:
        if step not in protect:
            discard(path)


def written_by(path: Path) -> tuple[str | None, int | None]:
    """The engine and the number of ranks that wrote a checkpoint; None where it does not say, which
    `verify` looks into.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        return manifest.get("engine"), manifest.get("ranks")
    except (OSError, ValueError, AttributeError):
        return None, None


def verify(path: Path) -> dict[str, Any]:
    """The manifest, after every file's size and checksum has been found right; `UserError`
    otherwise.
    """
    others = [p for _, p in list_checkpoints(path.parent) if p != path]
    advice = (
        f"resume from an older one with loop.resume={others[-1]}"
        if others
        else "start over with another run_dir"
    )
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        files, step = manifest["files"], manifest["step"]
        known = manifest["format"] == FORMAT
    except FileNotFoundError:
        raise UserError(f"{path}: not a checkpoint (no {MANIFEST}); {advice}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path / MANIFEST}: damaged; {advice}") from None
    except OSError as error:
        raise UserError(f"{path / MANIFEST}: {error.strerror}; {advice}") from None
    if not known:
        raise UserError(
            f"{path}: format {manifest['format']}, this version reads {FORMAT}; {advice}"
        )
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            raise UserError(f"{file}: missing from the checkpoint; {advice}")
        if file.stat().st_size != expected["bytes"] or _sha256(file) != expected["sha256"]:
            raise UserError(f"{file}: damaged, its checksum does not match the manifest; {advice}")
    return {"step": step, **manifest}
