"""What this machine offers: versions, optional parts, accelerator, disk speed and direct I/O at a
path.
"""

import mmap
import os
import platform
import shutil
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mnemic.train.errors import UserError

CORE = ("torch", "accelerate", "transformers", "peft", "safetensors", "pydantic")
OPTIONAL = {
    "datasets": "data: hub data sets, parquet",
    "wandb": "track: Weights & Biases",
    "bitsandbytes": "optimizers: AdamW8bit, QLoRA",
    "pytorch_optimizer": "optimizers: Muon, GaLore",
    "trl": "rl: TRL's trainers",
    "deepspeed": "offload: ZeRO on several GPUs",
}
TEST_BYTES = 128 << 20


def examine(path: Path) -> dict[str, Any]:
    """A report as plain values. Writes and removes one file of 128 MiB under `path`."""
    if not path.is_dir():
        raise UserError(f"{path}: not a folder; give one to measure the disk in")
    report: dict[str, Any] = {
        "mnemic": version("mnemic"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "packages": {name: _version(name) for name in (*CORE, *OPTIONAL)},
        "accelerator": _accelerator(),
        "disk": measure_disk(path),
    }
    report["remarks"] = _remarks(report)
    return report


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _accelerator() -> dict[str, Any] | None:
    import torch

    if not torch.accelerator.is_available():
        return None
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    found: dict[str, Any] = {"type": kind.type, "count": torch.accelerator.device_count()}
    if kind.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        found |= {
            "name": torch.cuda.get_device_name(),
            "free_bytes": free,
            "total_bytes": total,
            "bf16": torch.cuda.is_bf16_supported(),
        }
    return found


def measure_disk(path: Path) -> dict[str, Any]:
    """Sequential write and read of `TEST_BYTES` as the offload engine does them: over the reserved
    blocks of a file that has been written before, by O_DIRECT where that works, then fdatasync.
    """
    block = mmap.mmap(-1, 4 << 20)
    block.write(os.urandom(4 << 20))
    free = shutil.disk_usage(path).free
    result: dict[str, Any] = {"path": str(path), "free_bytes": free, "o_direct": False}
    if free < 2 * TEST_BYTES:
        return result | {"error": "too little free space to measure"}
    try:
        handle, name = tempfile.mkstemp(prefix=".mnemic-doctor-", dir=path)
    except OSError as error:
        return result | {"error": f"cannot be written: {error.strerror}"}
    try:
        handle = _direct(handle, name, block, result)
        for _ in range(2):
            # The first time over, the file system marks its blocks as written.
            os.lseek(handle, 0, os.SEEK_SET)
            start = time.perf_counter()
            for _ in range(TEST_BYTES // len(block)):
                os.write(handle, block)
            os.fsync(handle)
            result["write_bytes_per_second"] = TEST_BYTES / (time.perf_counter() - start)
        os.lseek(handle, 0, os.SEEK_SET)
        start = time.perf_counter()
        while os.readv(handle, [block]):
            pass
        result["read_bytes_per_second"] = TEST_BYTES / (time.perf_counter() - start)
    except OSError as error:
        result["error"] = f"failed while measuring: {error.strerror}"
    finally:
        os.close(handle)
        os.unlink(name)
    return result


def _direct(handle: int, name: str, block: Any, result: dict[str, Any]) -> int:
    """The file opened past the page cache, where the file system takes that; else as it is."""
    flag = getattr(os, "O_DIRECT", 0)
    try:
        direct = os.open(name, os.O_RDWR | flag)
        os.write(direct, block)
    except OSError:
        return handle
    os.close(handle)
    result["o_direct"] = bool(flag)
    return direct


def _remarks(report: dict[str, Any]) -> list[str]:
    """Sentences on what will and will not work here."""
    packages, disk, remarks = report["packages"], report["disk"], []
    missing = [n for n in CORE if packages[n] is None]
    if missing:
        remarks.append(f"will not run: {', '.join(missing)} missing; pip install mnemic")
    else:
        remarks.append("works: training (lm, sft), LoRA, DoRA, checkpoints, export, generate")
    for name, what in OPTIONAL.items():
        extra = what.split(":")[0]
        if packages[name] is None:
            remarks.append(f"not installed: {what.split(': ')[1]} (pip install 'mnemic[{extra}]')")
    if report["accelerator"] is None:
        remarks.append("no accelerator: trains on the CPU; small models only")
    if "error" in disk:
        remarks.append(f"disk at {disk['path']}: {disk['error']}")
    elif not disk["o_direct"]:
        remarks.append(f"disk at {disk['path']}: no O_DIRECT; the read speed is the page cache's")
    return remarks


def show(report: dict[str, Any]) -> None:
    from mnemic.train.callbacks.console import size

    print(
        f"mnemic {report['mnemic']}, Python {report['python']}, {report['system']}, "
        f"{report['cores']} cores"
    )
    for name, found in report["packages"].items():
        print(f"  {name:<14}{found or '-'}")
    device = report["accelerator"]
    if device:
        memory = (
            f", {size(device['free_bytes'])} of {size(device['total_bytes'])} free"
            if "name" in device
            else ""
        )
        print(f"accelerator: {device['count']} x {device.get('name', device['type'])}{memory}")
    disk = report["disk"]
    print(
        f"disk at {disk['path']}: {size(disk['free_bytes'])} free, "
        f"O_DIRECT {'yes' if disk['o_direct'] else 'no'}"
    )
    for way in ("write", "read"):
        speed = disk.get(f"{way}_bytes_per_second")
        if speed:
            print(f"  sequential {way}: {size(speed)}/s")
    for remark in report["remarks"]:
        print(f"- {remark}")
