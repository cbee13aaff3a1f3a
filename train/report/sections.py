"""The sections of the page, each from what runs hold; one that has nothing to say is empty."""

from collections.abc import Sequence
from typing import Any

from mnemic.train.callbacks.console import duration, size
from mnemic.train.recipe.load import to_yaml
from mnemic.train.report.charts import chart
from mnemic.train.report.diff import ABSENT, differing
from mnemic.train.report.figures import MORE, groups
from mnemic.train.report.markup import block, escape, folded, table
from mnemic.train.report.planned import Planned
from mnemic.train.report.read import Run

_LONGEST = 4000
"""Characters of a sample's text; the middle of a longer one is left out."""


def overview(runs: Sequence[Run]) -> str:
    """A line for each run: how far it came, at what cost, what it reached."""
    first = runs[0]
    columns = ["run", "state", "steps", "time", "tokens/s", "host peak", "device peak"]
    held = sorted({k for run in runs for row in run.rows for k in row if k.startswith("eval/")}
                  | {k for run in runs for k in run.summary.get("evaluation_last") or ()
                     if k.startswith("eval/")})  # fmt: skip
    rows = [
        [run.label, run.state, _of(run), _or_dash(run.seconds, _time),
         _or_dash(run.tokens_per_second(), "{:,.0f}".format), _or_dash(run.peak("host"), size),
         _or_dash(run.peak("device"), size)]
        for run in runs
    ]  # fmt: skip
    parts = [table(columns, rows)]
    if len(runs) == 1:
        parts.insert(0, block("p", f"{first.state}; {_of(first)} steps; {first.path}", "dim"))
    if held:
        parts.append(block("h2", "Held-out: before and after"))
        parts.append(table(["run", *(k.removeprefix("eval/") for k in held)],
                           [[run.label, *(before_after(run, key) for key in held)]
                            for run in runs]))  # fmt: skip
    for run in runs:
        parts += [block("p", f"{run.label}: {note}", "dim bad") for note in run.notes]
    return "".join(parts)


def before_after(run: Run, key: str) -> str:
    first, last = run.ends(key)
    if last is None:
        return "-"
    return f"{last:.4f}" if first is None else f"{first:.4f} \u2192 {last:.4f}"


def _of(run: Run) -> str:
    return f"{run.steps:,} of {run.total_steps:,}" if run.total_steps else f"{run.steps:,}"


def _time(seconds: float) -> str:
    return duration(seconds) if seconds >= 60 else f"{seconds:.1f} s"


def _or_dash(value: Any, form: Any) -> str:
    return "-" if value is None else form(value)


def differences(runs: Sequence[Run]) -> str:
    """The keys of the resolved recipes that are not the same in all runs."""
    if len(runs) < 2:
        return ""
    found = differing([run.recipe for run in runs])
    title = block("h2", "What differs in the recipes")
    if not found:
        return title + block("p", "nothing but name and run_dir", "dim")
    rows = [[key, *map(_value, values)] for key, values in found.items()]
    return title + table(["key", *(run.label for run in runs)], rows)


def _value(value: Any) -> str:
    if value is ABSENT:
        return "-"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return to_yaml(value).removesuffix("\n").removesuffix("\n...")


def curves(runs: Sequence[Run]) -> str:
    parts = []
    for group in groups(runs):
        charts = "".join(
            chart(f.title, f.lines, zero=f.zero, across=f.across, legend=len(runs) > 1)
            for f in group.figures
        )
        inner = f'<div class="charts">{charts}</div>'
        folds = group.title == MORE
        parts.append(folded("Other figures of the rows", inner) if folds
                     else block("h2", group.title) + inner)  # fmt: skip
    return "".join(parts) or block("p", "no rows of metrics, so no curves", "dim bad")


def budgets(runs: Sequence[Run]) -> str:
    """What the trained memory takes, of runs that count it."""
    counted = [run for run in runs if isinstance(run.summary.get("memory_bytes"), dict)]
    if not counted:
        return ""
    parts = list(dict.fromkeys(part for run in counted for part in run.summary["memory_bytes"]))
    rows = []
    for run in counted:
        budget = run.summary["memory_bytes"]
        rows.append([run.label, *(size(budget.get(part, 0)) for part in parts)])
    return block("h2", "Memory budget, all counted") + table(["run", *parts], rows)


def plan_against_measured(runs: Sequence[Run], planned: Sequence[Planned] | None) -> str:
    if planned is None:
        return ""
    rows, notes = [], []
    for run, plan in zip(runs, planned, strict=True):
        if plan.note:
            notes.append(block("p", f"{run.label}: {plan.note}", "dim"))
        for where, parts in (("host", plan.host), ("device", plan.device)):
            if not parts:
                continue
            total, seen = sum(parts.values()), run.peak(where)
            listed = ", ".join(f"{part} {size(nbytes)}" for part, nbytes in parts.items())
            apart = f"{total / seen - 1:+.1%}" if seen else "-"
            rows.append([run.label, where, size(total), _or_dash(seen, size), apart, listed])
    columns = ["run", "memory", "planned", "measured", "planned against it", "parts of the plan"]
    shown = table(columns, rows, wide=[5]) if rows else ""
    return block("h2", "Plan against measured, at the peak") + shown + "".join(notes)


def samples(runs: Sequence[Run]) -> str:
    parts = []
    for run in runs:
        if not run.samples:
            continue
        right = sum(_text(s, "generated") == _text(s, "reference") for s in run.samples)
        title = f"{run.label}: step {run.samples[0]['step']}, {right} of {len(run.samples)} equal"
        shown = "".join(map(_sample, run.samples))
        # Of one run they are what a reader came for; of several, a page of them hides the rest.
        parts.append(block("h3", title) + shown if len(runs) == 1 else folded(title, shown))
    return block("h2", "Samples of the last evaluation") + "".join(parts) if parts else ""


def _sample(sample: dict[str, Any]) -> str:
    texts = "".join(
        block("p", title, "dim") + block("div", _clipped(str(sample.get(key, ""))), "t")
        for key, title in (
            ("prompt", "prompt"), ("generated", "answer"), ("reference", "reference"),
        )
    )  # fmt: skip
    return f'<div class="sample">{texts}</div>'


def _text(sample: dict[str, Any], key: str) -> str:
    return str(sample.get(key, "")).strip()


def _clipped(text: str) -> str:
    if not text.strip():
        return "(nothing)"
    if len(text) <= _LONGEST:
        return text
    half = _LONGEST // 2
    return f"{text[:half]}\n[{len(text) - 2 * half:,} characters left out]\n{text[-half:]}"


def recipes(runs: Sequence[Run]) -> str:
    parts = [
        folded(f"{run.label}: recipe.yaml", f"<pre>{escape(to_yaml(run.recipe))}</pre>")
        for run in runs
    ]
    return block("h2", "Resolved recipes") + "".join(parts)
