"""The command, dying or losing its files at a chosen call: what a crash at that instant does.

`main(["die=POINT:N", "train", ...])` kills the process (SIGKILL) at the N-th call of POINT;
`gone=POINT:N:FOLDER` deletes FOLDER there and goes on.
"""

import atexit
import os
import shutil
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from support import ForkServer

import mnemic.train.checkpoint as checkpoint
import mnemic.train.offload.store as store
import mnemic.train.offload.work as work
from mnemic.train.callbacks.metrics import MetricsFile
from mnemic.train.checkpoint import CheckpointWriter
from mnemic.train.offload.files import SsdFile
from mnemic.train.offload.io import Io
from mnemic.train.offload.store import Store
from mnemic.train.offload.transfer import SafetensorsWriter
from mnemic.train.trainer import Trainer


def _always(*_: Any) -> bool:
    return True


def _to(*names: str) -> Callable[..., bool]:
    """Calls of os.rename and os.replace whose target begins so."""
    return lambda _, target: Path(target).name.startswith(names)


def _of(name: str) -> Callable[..., bool]:
    return lambda file, *_: file.path.endswith(name)


# (owner, function, whether after the call, which calls count)
POINTS: dict[str, tuple[Any, str, bool, Callable[..., bool]]] = {
    "folder noted": (work, "write_atomic", False, _always),
    "file reserved": (SsdFile, "_make", True, _always),
    "piece written": (Store, "write", False, _always),
    "write torn": (SsdFile, "write", False, _of("data.bin")),
    "row written": (MetricsFile, "on_row", True, _always),
    "commit begun": (Store, "commit", False, _always),
    "before fdatasync": (Io, "sync", False, _always),
    "after fdatasync": (Io, "sync", True, _always),
    "manifest torn": (store, "write_atomic", False, _always),
    "manifest written": (os, "replace", False, _to("commit")),
    "manifest renamed": (os, "replace", True, _to("commit")),
    "commit ended": (Store, "commit", True, _always),
    "checkpoint torn": (SsdFile, "write", False, _of("offload.bin")),
    "checkpoint written": (CheckpointWriter, "_commit", False, _always),
    "checkpoint synced": (os, "rename", False, _to("step-")),
    "checkpoint renamed": (os, "rename", True, _to("step-")),
    "checkpoint saved": (Trainer, "save", True, _always),
    "checkpoint discarded": (os, "rename", True, _to(".tmp-old-step")),
    "export torn": (SafetensorsWriter, "add", False, _always),
    "export written": (os, "rename", False, _to("final")),
}
assert checkpoint.os is os


def arm(point: str, count: int, act: Callable[[], None]) -> None:
    owner, name, after, counts = POINTS[point]
    inner, seen = getattr(owner, name), 0

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        seen += counts(*args)
        hit = counts(*args) and seen == count
        if hit and point.endswith("torn"):
            _half(point, args)
        if hit and not after:
            act()
        found = inner(*args, **kwargs)
        if hit and after:
            act()
        return found

    setattr(owner, name, wrapper)


def _half(point: str, args: tuple[Any, ...]) -> None:
    """Do the first half of the call."""
    if point == "manifest torn":
        path, data = args
        path.with_name(f".{path.name}.tmp").write_bytes(data[: len(data) // 2])
    elif point in ("write torn", "checkpoint torn"):
        file, offset, view = args
        os.pwritev(file.fd, [view[: max(4096, len(view) // 8192 * 4096)]], offset)


def main(args: list[str]) -> int:
    from mnemic.train.cli import main as real

    kind, _, rest = args[0].partition("=")
    if kind in ("die", "gone"):
        point, count, *folder = rest.split(":")
        act = {
            "die": lambda: os.kill(os.getpid(), signal.SIGKILL),
            "gone": lambda: shutil.rmtree(folder[0]),
        }[kind]
        arm(point, int(count), act)
        args = args[1:]
    return real(args)


class FaultServer(ForkServer):
    """Its processes take `die=` and `gone=` as their first argument."""

    CODE = ForkServer.CODE.replace(
        "from mnemic.train.cli import main\n",
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\nfrom faults import main\n",
    )
    assert CODE != ForkServer.CODE


@cache
def fault_server() -> FaultServer:
    """One for all tests."""
    server = FaultServer()
    atexit.register(server.close)
    return server
