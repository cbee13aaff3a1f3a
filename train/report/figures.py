"""Which charts a page has: by the keys that the runs' rows have, grouped as a reader asks.

The page draws them as SVG (charts.py), `--png` by matplotlib (draw.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from mnemic.train.report.charts import Line
from mnemic.train.report.read import Points, Run

_TITLES = {
    "loss": "training loss",
    "eval/loss": "held-out loss",
    "eval/exact_match": "held-out exact match",
    "eval/r1": "held-out r1 (questions right from the memory)",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "perf/host_peak_bytes": "host memory, peak of a step",
    "perf/device_peak_bytes": "device memory, peak of a step",
    "perf/saved_bytes": "saved for the backward",
    "perf/tokens_per_second": "tokens a second",
    "perf/step_seconds": "seconds a step",
    "tokens/kept": "kept tokens, share",
    "tokens/supervised_dropped": "supervised tokens dropped",
}
_GROUPS = (
    ("Loss and held-out results", ("loss", "eval/loss", "eval/exact_match", "eval/r1", "eval/*")),
    ("Rewards", ("reward/*",)),
    ("Optimizer", ("lr", "grad_norm")),
    ("Memory", ("perf/host_peak_bytes", "perf/device_peak_bytes", "perf/saved_bytes")),
    ("Throughput", ("perf/tokens_per_second", "perf/step_seconds")),
    ("Kept tokens", ("tokens/kept", "tokens/*")),
)
MORE = "More"
"""The group of all other keys, folded away."""
_LAYER = "tokens/kept_layer_"
# Counters, which say nothing that the charts above do not.
_LEFT_OUT = ("step", "tokens", "tokens_seen", "trained_tokens", "rows", "perf/eval_seconds")
_FROM_ZERO = ("perf/", "tokens/kept", "eval/exact_match")


@dataclass
class Figure:
    """A chart, its values in the unit that its title names. `name`: fit for a file's name."""

    name: str
    title: str
    lines: list[Line]
    zero: bool = False
    across: str = "step"


@dataclass
class Group:
    title: str
    figures: list[Figure] = field(default_factory=list)


def groups(runs: Sequence[Run]) -> list[Group]:
    """Those that have a figure."""
    keys = list(dict.fromkeys(key for run in runs for row in run.rows for key in row))
    left = [k for k in keys if k not in _LEFT_OUT and not k.startswith(_LAYER)]
    found = []
    for title, patterns in _GROUPS:
        group = Group(title)
        for pattern in patterns:
            own = [k for k in left if k == pattern or _under(k, pattern)]
            left = [k for k in left if k not in own]
            group.figures += [figure for key in sorted(own) if (figure := _figure(runs, key))]
        if title == "Kept tokens" and (layers := _layers(runs)):
            group.figures.append(layers)
        found.append(group)
    found.append(Group(MORE, [f for key in sorted(left) if (f := _figure(runs, key))]))
    return [group for group in found if group.figures]


def _under(key: str, pattern: str) -> bool:
    return pattern.endswith("/*") and key.startswith(pattern[:-1])


def _figure(runs: Sequence[Run], key: str) -> Figure | None:
    lines = [Line(run.label, run.points(key), i) for i, run in enumerate(runs)]
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    title = _TITLES.get(key, key)
    if key.endswith("_bytes"):
        unit, factor = _unit(max(value for line in lines for _, value in line.points))
        title += f", {unit}"
        lines = [
            Line(line.label, [(x, y / factor) for x, y in line.points], line.color)
            for line in lines
        ]
    return Figure(_file_name(key), title, lines, zero=key.startswith(_FROM_ZERO))


def _unit(most: float) -> tuple[str, float]:
    for unit, factor in (("GiB", 2.0**30), ("MiB", 2.0**20), ("KiB", 2.0**10)):
        if most >= factor:
            return unit, factor
    return "bytes", 1.0


def _layers(runs: Sequence[Run]) -> Figure | None:
    lines = [Line(run.label, kept_by_layer(run), i) for i, run in enumerate(runs)]
    if not any(line.points for line in lines):
        return None
    return Figure(
        "tokens_kept_by_layer", "kept tokens by layer, share, mean of the run", lines, zero=True,
        across="layer",
    )  # fmt: skip


def kept_by_layer(run: Run) -> Points:
    """(layer, share of the tokens that it keeps, mean over the run)."""
    points: Points = []
    for key in dict.fromkeys(key for row in run.rows for key in row if key.startswith(_LAYER)):
        values = [value for _, value in run.points(key)]
        if values:
            points.append((int(key.removeprefix(_LAYER)), sum(values) / len(values)))
    return sorted(points)


def _file_name(key: str) -> str:
    return "".join(c if c.isalnum() or c in "_-." else "_" for c in key)
