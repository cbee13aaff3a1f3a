"""A plan as text and as plain values."""

from dataclasses import asdict
from typing import Any

from mnemic.train.callbacks.console import duration, size
from mnemic.train.plan.plan import Report
from mnemic.train.plan.ways import Way

_WIDTH = 18
_EXACT = {
    "weights", "optimizer state", "layers", "vocabulary tiles", "state tiles", "small states",
    "rest", "gradient slots", "weights and states", "adapters", "teacher",
}  # fmt: skip
"""Parts that are what the run allocates; the others are measured on fake tensors, or estimated."""


def as_values(report: Report) -> dict[str, Any]:
    """The report for `--json`: bytes and seconds."""
    values = asdict(report)
    for way, shown in zip(report.ways, values["ways"], strict=True):
        shown |= {"host_bytes": way.host_bytes, "device_bytes": way.device_bytes}
    return values


def show(report: Report) -> None:
    machine = report.machine
    share = "all" if report.trained == report.parameters else f"{report.trained:,}"
    print(f"{report.name}: {report.model}")
    print(f"{report.parameters:,} parameters, {share} trained; {report.rows}")
    memory = f"{size(machine.available)} of {size(machine.total)} ({machine.limit}) free"
    if machine.device_total:
        memory += f"; {machine.device} {size(machine.device_available)} free"
    print(f"memory here: {memory}\n")
    ways = [way for way in report.ways if not way.refused]
    if ways:
        _table(report, ways)
    for way in report.ways:
        if way.refused:
            print(f"{way.name}: not for this recipe: {way.refused}")
    if report.totals:
        _lengths(report)
    for note in report.notes:
        print(f"- {note}")


def _row(name: str, cells: list[str]) -> None:
    print(f"{name:<26}" + "".join(f"{cell:>{_WIDTH}}" for cell in cells))


def _table(report: Report, ways: list[Way]) -> None:
    _row("", [f"{way.name}{' *' if way.chosen else ''}" for way in ways])
    for title, attribute in (("memory", "host"), ("device memory", "device")):
        parts = list(dict.fromkeys(part for way in ways for part in getattr(way, attribute)))
        if not parts:
            continue
        for part in parts:
            cells = [getattr(way, attribute).get(part, 0) for way in ways]
            if any(cells):
                _row("  " + part, [_about(part, cell) if cell else "-" for cell in cells])
        _row(title, ["~" + size(sum(getattr(way, attribute).values())) for way in ways])
    _row("most in", [way.peak for way in ways])
    kinds = list(dict.fromkeys(kind for way in ways for kind in way.disk))
    for kind in kinds:
        _row(f"disk: {kind}", [_or_dash(way.disk.get(kind, 0)) for way in ways])
    _row("read in a step", [_or_dash(way.read) for way in ways])
    _row("written in a step", [_or_dash(way.written) for way in ways])
    _row("  its time on this disk", [_seconds(way.floor_seconds) for way in ways])
    _row(f"steps to {report.tbw:g} TB written", [_steps(way) for way in ways])
    _row("fits here", ["yes" if w.fits else f"no: {', '.join(w.lacking)}" for w in ways])
    disk = report.disk
    print(
        f"* this recipe. ~ estimated. Disk at {', '.join(disk['paths'])}: "
        f"{size(disk['read_bytes_per_second'])}/s read, "
        f"{size(disk['write_bytes_per_second'])}/s written, {size(disk['free_bytes'])} free"
    )


def _lengths(report: Report) -> None:
    print()
    names = [way.name for way in report.ways if not way.refused]
    _row("memory by tokens of a row", names)
    for length, totals in report.totals.items():
        _row(f"  {length:,}", ["~" + size(totals[name] or 0) for name in names])


def _about(part: str, nbytes: int) -> str:
    return size(nbytes) if part in _EXACT else "~" + size(nbytes)


def _or_dash(nbytes: int) -> str:
    return size(nbytes) if nbytes else "-"


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return duration(seconds) if seconds >= 60 else f"{seconds:.2f} s"


def _steps(way: Way) -> str:
    return f"{way.endurance_steps:,}" if way.endurance_steps else "-"
