"""What this machine has: memory and its limits, the accelerator's, and what the imports take."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mnemic.train.recipe.recipe import Recipe

IMPORTS = 450 << 20
"""Resident bytes of a process that has imported what training imports and run one small step, where
they cannot be read: measured with torch 2.13 for CPUs and transformers 5.23 on Linux."""


@dataclass(frozen=True)
class Machine:
    """Bytes. `limit`: what bounds `total`, in words; `device`: the accelerator's type."""

    total: int
    available: int
    limit: str
    device: str = "cpu"
    device_total: int = 0
    device_available: int = 0


def this_machine(device: Any) -> Machine:
    """`device`: the torch device that the run would use."""
    total, limit = memory_limit()
    available = min(total, _meminfo("MemAvailable") or total)
    for group in _groups():
        bound = _number(group / "memory.max", group / "memory.limit_in_bytes")
        used = _number(group / "memory.current", group / "memory.usage_in_bytes")
        if bound is not None and used is not None:
            available = min(available, max(0, bound - used + _cache_of(group)))
    if device.type != "cuda":
        return Machine(total, available, limit)
    import torch

    free, size = torch.cuda.mem_get_info()
    return Machine(total, available, limit, "cuda", size, free)


def memory_limit() -> tuple[int, str]:
    """The most that a process here can have, and what sets it: RAM, a control group, or RLIMIT_AS.
    A very large number where nothing tells.
    """
    bounds = [(1 << 62, "unknown")]
    if ram := _meminfo("MemTotal"):
        bounds.append((ram + (_meminfo("SwapTotal") or 0), "RAM"))
    for group in _groups():
        bound = _number(group / "memory.max", group / "memory.limit_in_bytes")
        if bound is not None:
            bounds.append((bound, f"the control group {group}"))
    try:
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        if soft != resource.RLIM_INFINITY:
            bounds.append((soft, "ulimit -v"))
    except (ImportError, OSError):
        pass
    return min(bounds)


def _meminfo(key: str) -> int | None:
    try:
        found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
        return int(found[1]) * 1024 if found else None
    except OSError:
        try:
            pages = os.sysconf("SC_PHYS_PAGES")
            return pages * os.sysconf("SC_PAGE_SIZE") if key == "MemTotal" else None
        except (ValueError, OSError, AttributeError):
            return None


def _groups() -> list[Path]:
    """Folders of this process's memory control groups, and of those they are in."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup/memory" if controllers else "/sys/fs/cgroup")
        place = root / path.lstrip("/")
        # In a container the path is the host's, and the root is this group.
        found += [p for p in (place, *place.parents) if p.is_relative_to(root) and p.is_dir()]
    return found


def _number(*paths: Path) -> int | None:
    for path in paths:
        try:
            value = int(path.read_text())
            return value if value < 1 << 60 else None
        except (OSError, ValueError):  # absent, or "max"
            continue
    return None


def _cache_of(group: Path) -> int:
    """Page cache that the group can drop."""
    try:
        found = re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.M)
    except OSError:
        return 0
    return int(found[1]) if found else 0


def resident_bytes() -> int | None:
    """Of this process, now."""
    try:
        found = re.search(r"^VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def imports_bytes(recipe: Recipe, device: Any) -> int:
    """Resident bytes of this process, after importing what training imports and one small step: a
    library's code is resident when it has run.
    """
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import mnemic.train.export
    import mnemic.train.run
    import mnemic.train.trainer  # noqa: F401
    from mnemic.models.tiny import byte_tokenizer, tiny_llama

    if recipe.adapters.kind != "none":
        import peft  # noqa: F401
    model = tiny_llama(
        byte_tokenizer(), hidden_size=64, layers=1, heads=2, max_position=64, seed=0
    ).to(device)
    ids = torch.zeros((2, 64), dtype=torch.int64, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=device.type in ("cpu", "cuda"))
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    return resident_bytes() or IMPORTS


def run_device(recipe: Recipe) -> Any:
    """The torch device that a run of the recipe computes on."""
    import torch

    if recipe.loop.device == "cpu" or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.accelerator.current_accelerator() or torch.device("cpu")
