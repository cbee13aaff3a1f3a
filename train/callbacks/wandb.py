"""Weights & Biases: the rows of metrics.jsonl, under one run id for the life of the run folder.

Offline, a row is sent when its checkpoint is safe (or the run ends): a killed process has then sent
no step that will run again. What a kill kept from being sent is read back from wandb's own offline
file and sent on resume. A tracker that fails warns once; training goes on.
"""

import logging
import os
import struct
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnemic.train.callbacks.base import Callback, MetricsRow
from mnemic.train.callbacks.metrics import read_rows

if TYPE_CHECKING:
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
    ) -> None:
        self.run_dir, self.metrics, self.config = run_dir, metrics, config
        self.settings = {"name": run_name, "project": project, "entity": entity, "tags": tags}
        self.mode = resolve_mode(mode)
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

            self.run_id = self.run_id or self._remembered_id() or uuid.uuid4().hex[:8]
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
            for row in read_rows(self.metrics):
                if row["step"] <= trainer.step:
                    self._send(row)
        except Exception as error:
            self._give_up(error)

    def _remembered_id(self) -> str | None:
        path = self.run_dir / ".wandb_id"
        return path.read_text().strip() or None if path.exists() else None

    def on_row(self, trainer: "Trainer", row: MetricsRow) -> None:
        if self._run is None:
            return
        if self.mode == "online":
            self._send(row)
        else:
            self._waiting.append(dict(row))

    def on_save(self, trainer: "Trainer", step: int, path: Path) -> None:
        self._flush()

    def close(self, trainer: "Trainer", error: BaseException | None) -> None:
        if self._run is None:
            return
        # Rows past the last checkpoint run again after a failure; sent now, they would stand twice.
        if error is None:
            self._flush()
        try:
            import wandb

            self._run.finish(exit_code=0 if error is None else 1)
            wandb.teardown()
        except Exception as failure:
            self._give_up(failure)

    def _flush(self) -> None:
        rows, self._waiting = self._waiting, []
        for row in rows:
            self._send(row)

    def _send(self, row: MetricsRow) -> None:
        if self._run is None or row["step"] in self._sent or row["step"] < self._next_step:
            return
        try:
            self._run.log(row, step=row["step"])
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
