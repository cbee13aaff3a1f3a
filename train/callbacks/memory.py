"""Peak memory of each step and of the run: resident bytes of the process, allocated bytes of the
device.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mnemic.train.callbacks.base import Callback, MetricsRow

if TYPE_CHECKING:
    from mnemic.train.trainer import Trainer

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def host_peak_bytes() -> int:
    """Highest resident size since the last `reset_host_peak`, or of the process where that cannot
    be reset.
    """
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_host_peak() -> bool:
    """Start a new peak (Linux); False where the system does not allow it."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


class MemoryCallback(Callback):
    """Adds `perf/host_peak_bytes`, and on an accelerator `perf/device_peak_bytes`, both of this
    step alone.
    """

    def __init__(self) -> None:
        self.host_peak = self.device_peak = 0

    def on_start(self, trainer: "Trainer") -> None:
        self.host_peak = host_peak_bytes()
        reset_host_peak()

    def on_step(self, trainer: "Trainer", row: MetricsRow) -> None:
        if row["step"] == 0:
            return
        row["perf/host_peak_bytes"] = host_peak_bytes()
        self.host_peak = max(self.host_peak, row["perf/host_peak_bytes"])
        reset_host_peak()
        if trainer.accelerator.device.type == "cuda":
            row["perf/device_peak_bytes"] = torch.cuda.max_memory_allocated()
            self.device_peak = max(self.device_peak, row["perf/device_peak_bytes"])
            torch.cuda.reset_peak_memory_stats()

    def close(self, trainer: "Trainer", error: BaseException | None) -> None:
        self.host_peak = max(self.host_peak, host_peak_bytes())
