"""Progress on the terminal: a live bar where there is one, plain lines elsewhere."""

import time
from typing import TYPE_CHECKING, Any

from mnemic.train.callbacks.base import Callback, MetricsRow

if TYPE_CHECKING:
    from mnemic.train.trainer import Trainer


def size(num_bytes: float) -> str:
    """`1.2 GiB`."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} GiB"


def duration(seconds: float) -> str:
    """`3:05`, `1:02:03`."""
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"


class ConsoleCallback(Callback):
    """Shows step, loss, rate, time left and memory; evaluations get a line of their own.

    Off a terminal one line is printed every `PERIOD` seconds, at the first and at the last step.
    """

    PERIOD = 10.0

    def __init__(self, console: Any) -> None:
        self.console = console
        self._bar: Any = None
        self._task: Any = None
        self._started = self._printed = 0.0
        self._first_step = 0

    def on_start(self, trainer: "Trainer") -> None:
        self._started, self._first_step = time.perf_counter(), trainer.step
        if not trainer.is_main or not self.console.is_terminal:
            return
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=24),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
            console=self.console,
            transient=True,
        )
        self._task = self._bar.add_task(
            "", total=trainer.total_steps, completed=trainer.step, text=""
        )
        self._bar.start()

    def on_row(self, trainer: "Trainer", row: MetricsRow) -> None:
        step = row["step"]
        if step == 0:
            # The evaluation before training says nothing about the pace of steps.
            self._started = time.perf_counter()
        else:
            text = self._text(row)
            now = time.perf_counter()
            if self._bar:
                self._bar.update(self._task, completed=step, text=text)
            elif (
                now - self._printed >= self.PERIOD
                or step == trainer.total_steps
                or step == self._first_step + 1
            ):
                left = (
                    (now - self._started) / (step - self._first_step) * (trainer.total_steps - step)
                )
                self._print(f"step {step}/{trainer.total_steps}  {text}  {duration(left)} left")
                self._printed = now
        found = {k.removeprefix("eval/"): v for k, v in row.items() if k.startswith("eval/")}
        if found:
            numbers = "  ".join(f"{k} {v:.4f}" for k, v in found.items())
            took = row.get("perf/eval_seconds", 0.0)
            self._print(f"evaluation at step {step}: {numbers}  ({took:.0f} s)")

    def _text(self, row: MetricsRow) -> str:
        memory = row.get("perf/device_peak_bytes") or row.get("perf/host_peak_bytes", 0)
        rate = row["perf/tokens_per_second"]
        return f"loss {row['loss']:.4f}  {rate:,.0f} tok/s  peak {size(memory)}"

    def _print(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self, trainer: "Trainer", error: BaseException | None) -> None:
        if self._bar:
            self._bar.stop()
