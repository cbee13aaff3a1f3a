"""Callbacks: one concern each, a hook for each moment of a run, state of their own in the
checkpoint.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnemic.train.trainer import Trainer

MetricsRow = dict[str, Any]
"""One step's numbers. Keys under `perf/` depend on the machine; all others on the recipe alone."""


class Callback:
    """All hooks do nothing by default. Hooks run in list order; `on_step` on every rank, `on_row`
    on rank 0.
    """

    name = ""
    """Key of this callback's state in the checkpoint; empty for none."""

    def on_start(self, trainer: "Trainer") -> None:
        """After a resume, before the first step."""

    def on_step(self, trainer: "Trainer", row: MetricsRow) -> None:
        """After step `row["step"]` (0: before training); may add keys to the row or stop
        the run.
        """

    def on_row(self, trainer: "Trainer", row: MetricsRow) -> None:
        """The finished row, on rank 0."""

    def before_save(self, trainer: "Trainer", step: int) -> None:
        """Before a checkpoint, on rank 0: put on disk what its state refers to."""

    def on_save(self, trainer: "Trainer", step: int, path: Path) -> None:
        """After the checkpoint of `step` is safe on disk, on rank 0."""

    def close(self, trainer: "Trainer", error: BaseException | None) -> None:
        """At the end in any case, on every rank."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state
