"""Weights & Biases: the rows of metrics.jsonl, under one run id for the life of the run folder.

Offline, a row is sent when its checkpoint is safe (or the run ends): a killed process has then sent
no step that will run again. What a kill kept from being sent is read back from wandb's own offline
file and sent on resume. The last row waits for the result, whose tables and page stand in it, so
that both are there once or, after a kill, not yet. A tracker that fails warns once; training goes
on.
"""

import logging
import os
import struct
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnemic.train.callbacks import wandb_result
from mnemic.train.callbacks.base import Callback, MetricsRow
from mnemic.train.callbacks.metrics import read_rows

if TYPE_CHECKING:
    from mnemic.train.report.planned import Planned
    from mnemic.train.trainer import Trainer

log = logging.getLogger("mnemic")


def resolve_mode(mode: str) -> str:
    """`auto` is online with an API key (environment or netrc), else offline; WANDB_MODE overrides
    it.
    """
    if mode != "auto":
        return mode
    chosen = os.environ.get("WANDB_MODE")
    if chosen in ("online", "offline", "disabled"):
        return chosen
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    known = netrc.is_file() and "wandb" in netrc.read_text(errors="replace")
    return "online" if known else "offline"


class WandbCallback(Callback):
    """`planned`: what the plan says of the run, or None; `kind`: of the artifact that the result
    becomes (`adapter`, `model`), or None for no artifact; `limit`: its largest size in bytes.

    After a fit that did not fail the wandb run stays open for `finish`, which whoever exports the
    result calls.
    """

    name = "wandb"

    def __init__(
        self,
        *,
        run_dir: Path,
        metrics: Path,
        config: dict[str, Any],
        run_name: str,
        project: str,
        entity: str | None,
        tags: list[str],
        mode: str,
        planned: "Planned | None" = None,
        kind: str | None = None,
        limit: int = 2 << 30,
    ) -> None:
        self.run_dir, self.metrics, self.config = run_dir, metrics, config
        self.settings = {"name": run_name, "project": project, "entity": entity, "tags": tags}
        self.mode = resolve_mode(mode)
        self.planned, self.kind, self.limit = planned, kind, limit
        self.run_id: str | None = None
        self._run: Any = None
        self._waiting: list[MetricsRow] = []
        self._sent: set[int] = set()
        self._next_step = 0

    def on_start(self, trainer: "Trainer") -> None:
        if not trainer.is_main or self.mode == "disabled":
            return
        try:
            import wandb

            # An agent of a sweep chose the id, and knows the run by it.
            self.run_id = self.run_id or self._remembered_id() or os.environ.get("WANDB_RUN_ID")
            self.run_id = self.run_id or uuid.uuid4().hex[:8]
            (self.run_dir / ".wandb_id").write_text(self.run_id)
            self._sent = logged_steps(self.run_dir / "wandb", self.run_id)
            self._run = wandb.init(
                dir=str(self.run_dir),
                id=self.run_id,
                resume="allow",
                mode=self.mode,  # type: ignore[arg-type]
                config=self.config,
                settings=wandb.Settings(silent=True, init_timeout=30),
                **self.settings,
            )
            if self.mode == "online":
                self._next_step = int(self._run.step or 0)
            if self.planned:
                self._run.summary.update(wandb_result.plan_summary(self.planned))
            self._waiting = [r for r in read_rows(self.metrics) if r["step"] <= trainer.step]
            self._flush(trainer)
        except Exception as error:
            self._give_up(error)

    def _remembered_id(self) -> str | None:
        path = self.run_dir / ".wandb_id"
        return path.read_text().strip() or None if path.exists() else None

    def on_row(self, trainer: "Trainer", row: MetricsRow) -> None:
        if self._run is None:
            return
        self._waiting.append(dict(row))
        if self.mode == "online":
            self._flush(trainer)

    def on_save(self, trainer: "Trainer", step: int, path: Path) -> None:
        self._flush(trainer)

    def close(self, trainer: "Trainer", error: BaseException | None) -> None:
        # Rows past the last checkpoint run again after a failure; sent now, they would stand twice.
        if error is None:
            self._flush(trainer)
        else:
            self._end(exit_code=1)

    def finish(self, summary: dict[str, Any] | None = None, final: Path | None = None) -> None:
        """End the wandb run: with what the run reached and the folder it was exported to (None: it
        was stopped, and will go on), or, without a summary, as one that failed. Once.
        """
        if self._run is None:
            return
        if summary is None:
            self._end(exit_code=1)
            return
        digest = None
        try:
            with wandb_result.staged_in(self.run_dir / "wandb" / "data"):
                digest = self._result(summary, final)
        except Exception as error:
            self._give_up(error)
            return
        # After the end: until then the artifact may not be on the disk, or with the server.
        if self._end(exit_code=0) and digest:
            wandb_result.remember(self.run_dir, digest)

    def _result(self, summary: dict[str, Any], final: Path | None) -> str | None:
        """Send what stands at the end; returns the digest of a new artifact."""
        self._run.summary.update(wandb_result.result_summary(self.run_dir, self.planned))
        page = wandb_result.page_of(self.run_dir, self.planned) if final else {}
        rows, self._waiting = self._waiting, []
        for row in rows:
            self._send(row, page if row["step"] == summary["steps"] else {})
        if not (final and self.kind) or self._run is None:
            return None
        return wandb_result.log_artifact(
            self._run, self.run_dir, final, kind=self.kind, limit=self.limit,
            name=str(self.settings["name"]), summary=summary,
        )  # fmt: skip

    def _end(self, exit_code: int) -> bool:
        """Whether the run was ended in order."""
        if self._run is None:
            return False
        run, self._run = self._run, None
        try:
            import wandb

            run.finish(exit_code=exit_code)
            wandb.teardown()
        except Exception as failure:
            self._give_up(failure)
            return False
        return True

    def _flush(self, trainer: "Trainer") -> None:
        """Send the rows that wait, but for the last one of the run."""
        ends = trainer.step >= trainer.total_steps or trainer.stop_reason is not None
        rows, self._waiting = self._waiting, []
        for row in rows:
            if ends and row["step"] == trainer.step:
                self._waiting.append(row)
            else:
                self._send(row)

    def _send(self, row: MetricsRow, media: dict[str, Any] | None = None) -> None:
        if self._run is None or row["step"] in self._sent or row["step"] < self._next_step:
            return
        try:
            self._run.log({**row, **(media or {})}, step=row["step"])
            self._sent.add(row["step"])
        except Exception as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        log.warning("wandb failed (%s); training goes on, metrics.jsonl has every row", first)
        self._run = None

    def state_dict(self) -> dict[str, Any]:
        return {"run_id": self.run_id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.run_id = state["run_id"]


def logged_steps(folder: Path, run_id: str) -> set[int]:
    """Steps of a run that offline folders already hold."""
    steps: set[int] = set()
    for path in folder.glob(f"*run-*-{run_id}/run-{run_id}.wandb"):
        for record in offline_records(path):
            if record.WhichOneof("record_type") == "history":
                steps.update(
                    int(item.value_json)
                    for item in record.history.item
                    if (item.key or "/".join(item.nested_key)) == "step"
                )
    return steps


def offline_records(path: Path) -> Iterator[Any]:
    """Protobuf records of a `.wandb` file: LevelDB's log format behind a 7-byte header; a torn end
    is passed over.
    """
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    block, offset, parts = 32768, 7, b""
    while offset + 7 <= len(data):
        left = block - offset % block
        if left < 7:
            offset += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, offset)
        payload = data[offset + 7 : offset + 7 + length]
        if kind == 0 or len(payload) < length:
            return
        offset += 7 + length
        parts = payload if kind in (1, 2) else parts + payload
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
            record.ParseFromString(parts)
            yield record
