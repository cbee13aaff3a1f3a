"""metrics.jsonl: one row a step, always written, never a step twice.

A checkpoint remembers how many bytes of the file belong to it; a resumed run cuts the file there,
so a torn last line and rows of steps that will run again disappear.
"""

import json
import os
from typing import TYPE_CHECKING, Any

from mnemic.train.callbacks.base import Callback, MetricsRow
from mnemic.train.errors import UserError

if TYPE_CHECKING:
    from pathlib import Path

    from mnemic.train.trainer import Trainer


class MetricsFile(Callback):
    name = "metrics"

    def __init__(self, path: "Path") -> None:
        self.path = path
        self._keep = 0
        self._file: Any = None

    def on_start(self, trainer: "Trainer") -> None:
        if trainer.is_main:
            try:
                self._file = self.path.open("ab")
                if self._keep > self._file.tell():
                    raise UserError(
                        f"{self.path}: shorter than the checkpoint says; it was changed by hand. "
                        "Restore it, or delete the run folder"
                    )
                self._file.truncate(self._keep)
            except OSError as error:
                raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None

    def on_row(self, trainer: "Trainer", row: MetricsRow) -> None:
        try:
            self._file.write(json.dumps(row).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"{self.path}: step {row['step']} could not be written: {error.strerror}; "
                "make room, then run the same command again"
            ) from None

    def before_save(self, trainer: "Trainer", step: int) -> None:
        os.fsync(self._file.fileno())

    def close(self, trainer: "Trainer", error: BaseException | None) -> None:
        if self._file:
            self._file.close()

    def state_dict(self) -> dict[str, Any]:
        return {"bytes": self._file.tell() if self._file else self._keep}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._keep = state["bytes"]


def read_rows(path: "Path") -> list[MetricsRow]:
    """All complete rows of a metrics file."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]
