"""What the cells of a grid reached, as a table: a line for each, and mean and deviation over
seeds.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from mnemic.train.callbacks.console import size
from mnemic.train.report.read import Run
from mnemic.train.rollout.report import plain_table


@dataclass
class Result:
    """A cell's figures; None for what it has not. `state`: finished, stopped, unfinished, failed or
    refused; `reason`: why, in a sentence. `peak_bytes`: of the device where there is one.
    """

    cell: str
    setting: list[str]
    seed: int | None
    state: str
    steps: int | None = None
    eval_loss_first: float | None = None
    eval_loss_last: float | None = None
    exact_match: float | None = None
    peak_bytes: int | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    reason: str = ""


def _fixed(digits: int) -> Callable[[float], str]:
    return f"{{:,.{digits}f}}".format


_FIGURES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("steps", "steps", _fixed(0)),
    ("eval_loss_first", "eval loss first", _fixed(4)),
    ("eval_loss_last", "last", _fixed(4)),
    ("exact_match", "exact match", _fixed(4)),
    ("peak_bytes", "peak", size),
    ("seconds", "seconds", _fixed(1)),
    ("tokens_per_second", "tokens/s", _fixed(0)),
)
COLUMNS = ("cell", "state", *(title for _, title, _ in _FIGURES))


def result(run: Run, setting: list[str], seed: int | None, error: str = "") -> Result:
    """Of a run folder; `error` is what a failed cell said."""
    state, _, reason = run.state.partition(": ")
    first, last = run.ends("eval/loss")
    return Result(
        run.path.name, setting, seed, "failed" if error else state, steps=run.steps,
        eval_loss_first=first, eval_loss_last=last, exact_match=run.ends("eval/exact_match")[1],
        peak_bytes=run.peak("device") or run.peak("host"), seconds=run.seconds,
        tokens_per_second=run.tokens_per_second(), reason=error or reason,
    )  # fmt: skip


def cells_of(results: Sequence[Result]) -> list[list[str]]:
    """Lines of the table, in the order of the grid; after the seeds of a setting their mean."""
    lines = []
    for i, one in enumerate(results):
        lines.append([one.cell, one.state, *(_cell(one, *f) for f in _FIGURES)])
        ends = i + 1 == len(results) or results[i + 1].setting != one.setting
        group = [r for r in results if r.setting == one.setting]
        if ends and len(group) > 1 and any(r.state == "finished" for r in group):
            lines.append(_mean(group))
    return lines


def _cell(one: Result, key: str, _: str, form: Callable[[float], str]) -> str:
    value = getattr(one, key)
    return "-" if value is None else form(value)


def _mean(group: Sequence[Result]) -> list[str]:
    """Over the seeds that finished: a run that ended early is no draw of the same thing."""
    done = [r for r in group if r.state == "finished"]
    cells = []
    for key, _, form in _FIGURES:
        values = [v for r in done if (v := getattr(r, key)) is not None]
        cells.append(_spread(values, form))
    return [f"  mean of {' '.join(group[0].setting)}", f"{len(done)} seeds", *cells]


def _spread(values: Sequence[float], form: Callable[[float], str]) -> str:
    if not values:
        return "-"
    if len(values) == 1:
        return form(values[0])
    deviation = stdev(values)
    near = 0.0 if math.isclose(deviation, 0.0, abs_tol=1e-12) else deviation
    return f"{form(fmean(values))} \u00b1 {form(near)}"


def show(results: Sequence[Result]) -> None:
    """Print the table, and the reasons below it."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        # A table in a file or a pipe is not folded to the width rich assumes there.
        console = Console(highlight=False, markup=False, width=200)
    drawn: Any = plain_table(*COLUMNS)
    for line in cells_of(results):
        drawn.add_row(*line)
    console.print(drawn)
    for one in results:
        if one.reason:
            console.print(f"- {one.cell}: {one.state}: {one.reason}", soft_wrap=True)
