"""The run folder: who may use it, what it holds, where a run goes on. No torch.

recipe.yaml    the resolved recipe          checkpoints/  see checkpoint.py metrics.jsonl  one row a
step               final/        the trained model as a plain HF or PEFT folder samples.jsonl
generations at evaluations   summary.json  what the run reached
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mnemic.train.checkpoint import fsync_folder, list_checkpoints, write_atomic
from mnemic.train.errors import UserError
from mnemic.train.recipe.load import dump_recipe, read_yaml, to_yaml
from mnemic.train.recipe.recipe import Recipe

log = logging.getLogger("mnemic")

# What may differ between a run and its continuation without making it another run.
_FREE = (
    "name", "run_dir", "track", "evaluation", "data.on_bad_row", "loop.steps", "loop.epochs",
    "loop.save_every", "loop.keep_checkpoints", "loop.resume", "loop.micro_batch_size",
    "loop.device", "loop.gradient_checkpointing", "loop.checkpoint_every",
    "loop.sequence_chunk", "loop.mlp_tile", "loop.loss", "tokens.probe_every",
    "loop.memory_budget", "offload.ram_budget", "offload.activations",
    "offload.direct", "offload.trace",
)  # fmt: skip


class RunFolder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.metrics = path / "metrics.jsonl"
        self.samples = path / "samples.jsonl"
        self.checkpoints = path / "checkpoints"
        self.final = path / "final"
        self.summary = path / "summary.json"
        self._lock: Any = None

    def claim(self, recipe: Recipe) -> Path | None:
        """Make or enter the folder, lock it, write the recipe; returns the checkpoint to go on
        from.

        Refuses a folder that another process uses or that holds another run.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock()
            start = self._starting_point(recipe)
            write_atomic(self.recipe, to_yaml(dump_recipe(recipe)).encode())
        except FileExistsError:
            raise UserError(f"run_dir: {self.path} is a file, not a folder") from None
        except OSError as error:
            raise UserError(
                f"run_dir: {self.path} cannot be written: {error.strerror}; choose another run_dir"
            ) from None
        return start

    def lock(self, option: str = "run_dir") -> None:
        """Keep other processes out until `release`; `UserError`, in the words of the option that
        names the folder, where one is in.
        """
        try:
            import fcntl
        except (
            ImportError
        ):  # Windows has no flock; two processes on one folder stay the user's care.
            return
        self._lock = (self.path / ".lock").open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "unknown"
            raise UserError(
                f"{option}: {self.path} is in use by another mnemic process (pid {holder}); "
                f"wait for it, or choose another {option}"
            ) from None
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()

    def release(self) -> None:
        if self._lock:
            self._lock.close()
            self._lock = None

    @property
    def used(self) -> bool:
        """A run that ended before its first row (a wrong pattern, no memory) leaves nothing to
        keep.
        """
        return self.metrics.exists() or bool(self.newest())

    def _starting_point(self, recipe: Recipe) -> Path | None:
        resume, used = recipe.loop.resume, self.used
        if resume == "never" and used:
            raise UserError(
                f"run_dir: {self.path} already holds a run and loop.resume=never; "
                "choose another run_dir, or delete the folder"
            )
        if used and self.recipe.exists():
            self._refuse_another_run(recipe)
        if resume in ("auto", "never"):
            return self.newest()
        path = Path(resume).expanduser()
        if self.newest() and path.resolve().parent != self.checkpoints.resolve():
            raise UserError(
                f"run_dir: {self.path} already holds a run, so it cannot begin from {path}; "
                "choose another run_dir"
            )
        if not path.is_dir():
            raise UserError(f"loop.resume: {path} is not a folder; give a folder of checkpoints/")
        for _, later in list_checkpoints(self.checkpoints):
            if later.name > path.name:
                # Otherwise the next start would prefer it. Nothing is deleted.
                later.rename(later.with_name(f"set-aside-{later.name}"))
                log.warning("%s: set aside, since the run goes on from %s", later, path.name)
        return path

    def _refuse_another_run(self, recipe: Recipe) -> None:
        old, new = flat(read_yaml(self.recipe)), flat(dump_recipe(recipe))
        if keys := self.differing(recipe):
            shown = ", ".join(f"{k} {old.get(k)!r} -> {new.get(k)!r}" for k in keys[:4])
            more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
            raise UserError(
                f"run_dir: {self.path} holds a run of another recipe ({shown}{more}); choose "
                "another run_dir (or name), or delete the folder"
            )

    def differing(self, recipe: Recipe) -> list[str]:
        """Keys by which `recipe` is another run than the one that is here."""
        old, new = flat(read_yaml(self.recipe)), flat(dump_recipe(recipe))
        keys = [k for k in {**old, **new} if old.get(k) != new.get(k)]
        keys = [k for k in keys if not any(k == f or k.startswith(f + ".") for f in _FREE)]
        if new.get("offload.kind") == "none":
            # Then it is where a scratch file lies, no more.
            keys = [k for k in keys if k != "offload.path"]
        holdout = "evaluation.holdout"
        return [*keys, holdout] if old.get(holdout) != new.get(holdout) else keys

    def newest(self) -> Path | None:
        found = list_checkpoints(self.checkpoints)
        return found[-1][1] if found else None

    def read_summary(self) -> dict[str, Any] | None:
        return json.loads(self.summary.read_bytes()) if self.summary.exists() else None


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[prefix + key] = value
    return found


def open_run(path: str) -> tuple[RunFolder, Recipe]:
    """An existing run folder and its recipe, for commands that read it."""
    from mnemic.train.recipe.load import build_recipe

    folder = RunFolder(Path(path))
    if not folder.recipe.is_file():
        raise UserError(
            f"{path}: not a run folder (no recipe.yaml); give the run_dir of a finished run"
        )
    return folder, build_recipe(read_yaml(folder.recipe), source=str(folder.recipe))


@contextmanager
def replace_folder(target: Path) -> Iterator[Path]:
    """A temp folder to fill, which then takes `target`'s place; a failure leaves that alone."""
    temp = target.with_name(f".tmp-{target.name}")
    shutil.rmtree(temp, ignore_errors=True)
    try:
        temp.mkdir(parents=True)
        yield temp
    except Exception as error:
        # safetensors, tokenizers and the file system each have a type for a failed write.
        shutil.rmtree(temp, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"the model could not be exported to {target}: {reason}") from error
    if target.exists():
        shutil.rmtree(target)
    os.rename(temp, target)
    fsync_folder(target.parent)
