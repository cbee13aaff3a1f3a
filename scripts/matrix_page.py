"""From the results of a walk to a report, docs/matrix.json, and to a page of it, docs/matrix.md."""

from collections import Counter
from collections.abc import Iterable
from itertools import product
from textwrap import fill
from typing import Any

from matrix_cells import AXES, STEPS, Cell, all_cells, neighbours
from matrix_check import Comparison
from matrix_try import Result

RAN, FAILED = ".", "!"
KEYS = {axis: f"`{axis}`" for axis in AXES} | {"ranks": "processes"}
INNER = ("optimizer", "tokens", "ranks")
"""Axes that a field of a table sums up."""


def summarize(results: list[Result], comparison: Comparison) -> dict[str, Any]:
    """Totals, reasons, warnings and, in `cells`, a letter for each cell: `.` ran, `!` failed, else
    the first of its reasons.
    """
    found = {result.cell: result for result in results}
    alone: dict[str, list[Cell]] = {}
    counts: Counter[str] = Counter()
    for result in results:
        if result.status == "refused":
            counts.update(result.reasons)
            if len(result.reasons) == 1:
                alone.setdefault(result.reasons[0], []).append(result.cell)
    ordered = sorted(counts, key=lambda reason: (-counts[reason], reason))
    letters = {reason: _letter(number) for number, reason in enumerate(ordered)}
    cells: dict[str, str] = {}
    for cell in all_cells():
        result = found[cell]
        code = {"ran": RAN, "failed": FAILED}.get(result.status) or letters[result.reasons[0]]
        key = " ".join(cell[:3])
        cells[key] = cells.get(key, "") + code
    warnings = Counter(text for r in results if r.status == "ran" for text in set(r.warnings))
    return {
        "axes": {axis: list(values) for axis, values in AXES.items()},
        "totals": dict(Counter(result.status for result in results)),
        "equal": comparison.equal,
        "largest": float(f"{comparison.largest:.1e}"),
        "different": comparison.different,
        "reasons": {
            letters[reason]: {
                "reason": reason,
                "cells": counts[reason],
                "alone": len(alone.get(reason, [])),
                "lifted": _lifted(reason, alone.get(reason, []), found),
            }
            for reason in ordered
        },
        "warnings": dict(warnings.most_common()),
        "cells": cells,
    }


def _letter(number: int) -> str:
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
    assert number < len(letters), "more reasons than letters"
    return letters[number]


def _lifted(reason: str, alone: list[Cell], found: dict[Cell, Result]) -> dict[str, dict[str, int]]:
    """Axis -> value -> how many of the cells refused for this reason alone run with that value in
    place of theirs: the values that do most. Of a reason that is never alone: cells that it leaves.
    """

    def lifts(cell: Cell) -> bool:
        result = found[cell]
        return result.status == "ran" if alone else reason not in result.reasons

    cells = alone or [cell for cell, result in found.items() if reason in result.reasons]
    counts = {
        (axis, str(value)): sum(
            lifts(other) for cell in cells for other in neighbours(cell, axis)
            if getattr(other, axis) == value
        )
        for axis, values in AXES.items() for value in values
    }  # fmt: skip
    most = max(counts.values())
    lifted: dict[str, dict[str, int]] = {}
    for (axis, value), count in counts.items():
        if count == most:
            lifted.setdefault(axis, {})[value] = count
    return lifted


def code_of(report: dict[str, Any], cell: Cell) -> str:
    """The letter of `cell`."""
    place = 0
    for axis, value in list(zip(AXES, cell, strict=True))[3:]:
        place = place * len(AXES[axis]) + AXES[axis].index(value)
    return report["cells"][" ".join(cell[:3])][place]


def render(report: dict[str, Any]) -> str:
    totals = report["totals"]
    ran, refused, failed = (totals.get(key, 0) for key in ("ran", "refused", "failed"))
    return "\n\n".join([
        "# Which combinations run",
        _wrap(
            f"Each of {sum(totals.values()):,} combinations of seven choices, tried with a small "
            f"model on a CPU: **{ran:,} run, {refused:,} are refused with a reason, {failed:,} "
            "fail.** `python scripts/matrix.py --write` tries all and writes this page; `pytest "
            "tests/e2e/test_matrix.py` tries cells in which every pair of values meets, and holds "
            "the page to them."
        ),
        _lines(
            ["choice", "values"],
            ([f"`{a}`", ", ".join(f"`{v}`" for v in vs)] for a, vs in report["axes"].items()),
        ),
        "\n".join(_wrap("- " + note, "  ") for note in NOTES),
        _wrap(
            f"*Runs*: {STEPS} steps with finite losses; every trained tensor changed; tokens were "
            "dropped where that was asked; no error. *Refused*: by `mnemic validate`, or for the "
            "number of processes at the start of `mnemic train`, before a model is built. Of "
            f"those that ran, {report['equal']:,} were compared with the same run by `update: "
            "plain`, without offload, in one process: losses and gradient norms agree to "
            f"{report['largest']:.0e} relative. {report['different']:,} pairs that differ in "
            "optimizer, tokens or adapters have different figures: none of these is without "
            "effect."
        ),
        "## What runs",
        "A field says for which optimizers, tokens and numbers of processes; *all* is every one.",
        *(_table(report, objective) for objective in AXES["objective"]),
        "## Reasons",
        _wrap(
            "*Cells*: how many are refused for it; *alone*: for nothing else. *Lifted by*: a "
            "change of one choice that makes the latter run, or most of them (of a reason that is "
            "never alone: that takes it away)."
        ),
        _lines(["reason", "cells", "alone", "lifted by"], map(_reason, report["reasons"].values())),
        "## Said without being refused",
        _lines(["warning", "runs"], ([text, f"{n:,}"] for text, n in report["warnings"].items())),
    ]) + "\n"  # fmt: skip


NOTES = (
    "With `update: streamed`, `offload` is `offload.kind`: where weights and states lie (and, with "
    "`ssd`, layer inputs). With the other updates weights stay with the model, and it is "
    "`offload.activations`; `offload.kind: host` or `ssd` is refused there.",
    "`tokens: on` is `drop` without `protect` for `lm`, where every token is supervised, and "
    "`protect` for the others.",
    "`bank` is a bank of two operations. A bank of one can be streamed.",
    "Ranks are processes with whole copies (DDP), on gloo.",
)


def _wrap(text: str, indent: str = "") -> str:
    return fill(text, 140, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def _lines(head: list[str], rows: Iterable[list[str]]) -> str:
    """A table."""
    made = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(text.split()).replace("|", "\\|") for text in row) + " |"
        for row in made
    )


def _reason(entry: dict[str, Any]) -> list[str]:
    of = entry["alone"] or entry["cells"]
    counts = {count for values in entry["lifted"].values() for count in values.values()}
    (count,) = counts  # of the values that do most
    lifted = "; ".join(
        f"{KEYS[axis]}: {', '.join(values)}" for axis, values in entry["lifted"].items()
    )
    partly = "" if count == of else f" ({count:,} of {of:,})"
    return [entry["reason"], f"{entry['cells']:,}", f"{entry['alone']:,}", lifted + partly]


def _table(report: dict[str, Any], objective: str) -> str:
    """Rows of update and offload; those of equal content are one."""
    rows: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for update, offload in product(AXES["update"], AXES["offload"]):
        fields = tuple(
            _field(report, objective, update, offload, adapters) for adapters in AXES["adapters"]
        )
        rows.setdefault(fields, {}).setdefault(update, []).append(offload)
    lines = []
    for fields, places in rows.items():
        merged: dict[tuple[str, ...], list[str]] = {}
        for update, offloads in places.items():
            merged.setdefault(tuple(offloads), []).append(update)
        for offloads, updates in merged.items():
            names = [", ".join(f"`{v}`" for v in part) for part in (updates, offloads)]
            lines.append([*names, *fields])
    head = [f"`{objective}`: update", "offload", "no adapters", "`lora`", "`bank`"]
    return _lines(head, lines)


def _field(report: dict[str, Any], objective: str, update: str, offload: str, adapters: str) -> str:
    """For which values of the inner axes the cells run, in words."""
    ran = []
    for optimizer, tokens, ranks in product(*(AXES[axis] for axis in INNER)):
        cell = Cell(objective, optimizer, update, offload, tokens, adapters, ranks)
        if code_of(report, cell) == RAN:
            ran.append((optimizer, tokens, ranks))
    if not ran:
        return "-"
    columns = list(zip(*ran, strict=True))
    parts = [[v for v in AXES[a] if v in set(got)] for a, got in zip(INNER, columns, strict=True)]
    if len(ran) < len(list(product(*parts))):
        return f"{len(ran)} of {len(list(product(*(AXES[a] for a in INNER))))}"
    words = [_only(axis, part) for axis, part in zip(INNER, parts, strict=True)]
    return ", ".join(word for word in words if word) or "all"


def _only(axis: str, values: Iterable[Any]) -> str:
    """The restriction to `values`; "" where that is every value."""
    values = list(values)
    missing = [v for v in AXES[axis] if v not in values]
    if not missing:
        return ""
    if axis == "optimizer":
        short = missing if len(missing) < len(values) else values
        return ("not " if short is missing else "") + ", ".join(f"`{v}`" for v in short)
    if axis == "tokens":
        return f"tokens {values[0]}"
    return f"{values[0]} process" + ("" if values[0] == 1 else "es")
