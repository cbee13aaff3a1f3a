"""The figures of the memory pipeline's systems side by side: tables, and JSON in the form of the
benchmarks with what each system wrote.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mnemic.train.data.memory.episode import EpisodeRow
from mnemic.train.rollout.paired import difference, f1_of, mean_of
from mnemic.train.rollout.pipeline_suite import (
    METRICS,
    Outcome,
    answers_of,
    extraction,
    figures,
)
from mnemic.train.rollout.report import plain_table, printable

_EXTRACT = {
    "JSON": "json_valid", "facts": "facts_per_chunk", "precision": "precision", "recall": "recall",
    "F1": "f1", "soft F1": "soft_f1", "exact F1": "exact_f1", "made up": "fabrication",
    "left out": "omission",
}  # fmt: skip
_UPDATE = {
    "readable": "readable", "refused": "refused", "+": "share_insert", "=": "share_update",
    "-": "share_delete", "noop": "share_noop", "operation": "operation_accuracy",
    "id": "id_accuracy", "all right": "all_right", "made up": "fabrication",
    "left out": "omission",
}  # fmt: skip
_TITLES = {"score": "score", "f1": "F1", "rouge_l": "ROUGE-L", "meteor": "METEOR", "em": "EM"}


@dataclass
class PipelineReport:
    """`rows`: figures by system, in the order played. `samples`: outcomes as plain values, each
    with `made_with`, which says what it is an outcome of.
    """

    target: str
    suite: str
    streams: Sequence[EpisodeRow]
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    env: dict[str, Any] = field(default_factory=dict)
    samples: dict[str, dict[str, Any]] = field(default_factory=dict)
    _outcomes: dict[str, Outcome] = field(default_factory=dict)

    def add(
        self, outcome: Outcome, made_with: dict[str, Any], sizes: dict[str, int] | None = None
    ) -> None:
        """`sizes`: bytes of the adapter that did each operation."""
        row = {"name": outcome.name, **figures(outcome, self.streams)}
        for op, own in row["operations"].items():
            own["adapter_bytes"] = (sizes or {}).get(op, 0)
        first = self._outcomes.get("experts")
        if first is not None:
            row["experts_minus"] = minus(first, outcome, self.streams)
        self.rows.append(row)
        self.notes += [note for note in outcome.notes if note not in self.notes]
        self._outcomes[outcome.name] = outcome
        self.samples[outcome.name] = {"made_with": made_with, **outcome.to_json()}

    def ratios(self) -> dict[str, float]:
        """The experts' figures over those of each other system; none over nothing."""
        own = next((row for row in self.rows if row["name"] == "experts"), None)
        found: dict[str, float] = {}
        if own is None:
            return found
        for row in self.rows:
            if row is own:
                continue
            for key in ("score", "f1"):
                if row[key]:
                    found[f"{key}_vs_{row['name']}"] = own[key] / row[key]
            if row.get("extract", {}).get("f1"):
                found[f"extract_f1_vs_{row['name']}"] = own["extract"]["f1"] / row["extract"]["f1"]
        return found


def minus(ours: Outcome, theirs: Outcome, rows: Sequence[EpisodeRow]) -> dict[str, Any]:
    """Paired differences (paired.py): of the score and the F1 over all questions, of the score by
    type, and of extraction's F1 over chunks where both extract and gold facts are known.
    """
    types = [q.type for row in rows for q in row.questions]
    marks = [answers_of(one, rows) for one in (ours, theirs)]

    def of(metric: str, kind: str | None = None) -> dict[str, float] | None:
        picked = [
            [[mark[metric]] for mark, own in zip(side, types, strict=True) if kind in (None, own)]
            for side in marks
        ]
        return difference(picked[0], picked[1], mean_of)

    found: dict[str, Any] = {metric: of(metric) for metric in METRICS}
    if all("judged" in side[0] for side in marks):
        found["judged"] = of("judged")
    found["by_type"] = {kind: of("score", kind) for kind in sorted(set(types))}
    if ours.turns and theirs.turns:
        counts = [
            [[one.matched, one.judged, one.gold] for own in extraction(side, rows) for one in own]
            for side in (ours, theirs)
        ]
        if any(gold for _, _, gold in counts[0]):
            found["extract_f1"] = difference(counts[0], counts[1], f1_of)
    return found


def write(report: PipelineReport, path: Path) -> None:
    """`{"rows", "ratios", "env", "samples"}`, in one step: a run that is cut off leaves the last
    whole file.
    """
    import platform

    import torch
    import transformers

    env = {
        **report.env, "target": report.target, "suite": report.suite, "notes": report.notes,
        "torch": torch.__version__, "transformers": transformers.__version__,
        "python": platform.python_version(), "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }  # fmt: skip
    found = {"rows": report.rows, "ratios": report.ratios(), "env": env, "samples": report.samples}
    temp = path.with_name(f".{path.name}.part")
    temp.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    os.replace(temp, path)


def show(report: PipelineReport) -> None:
    """Print it."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        # A table in a file or a pipe is not folded to the width rich assumes there.
        console = Console(highlight=False, markup=False, width=140)
    questions = sum(len(row.questions) for row in report.streams)
    chunks = sum(len(row.chunks) for row in report.streams)
    console.print(
        f"{report.target}: {report.suite}, {len(report.streams)} streams of {chunks} chunks, "
        f"{questions} questions"
    )
    console.print(_answers(report.rows))
    console.print(_by_type(report.rows))
    for title, key, columns in (("extraction", "extract", _EXTRACT), ("update", "update", _UPDATE)):
        own = [row for row in report.rows if key in row]
        if own:
            table = plain_table(title, *columns)
            for row in own:
                table.add_row(row["name"], *(_cell(row[key][name]) for name in columns.values()))
            console.print(table)
    console.print(_operations(report.rows))
    if any("experts_minus" in row for row in report.rows):
        console.print(_differences(report.rows))
    for note in report.notes:
        console.print(f"- {note}", soft_wrap=True)


def _answers(rows: Sequence[dict[str, Any]]) -> Any:
    judged = ["judged"] if any("judged" in row for row in rows) else []
    table = plain_table(
        "answers", *_TITLES.values(), *judged, "score if told", 'says "none"', "entries", "tokens"
    )
    for row in rows:
        told = row["answerable"]["score"]
        table.add_row(
            row["name"], *(_cell(row.get(name)) for name in [*_TITLES, *judged]), _cell(told),
            _cell(row["abstained"]), f"{row['entries']:.1f}", f"{row['memory_tokens']:.0f}",
        )  # fmt: skip
    return table


def _by_type(rows: Sequence[dict[str, Any]]) -> Any:
    table = plain_table("score by type", "questions", *(row["name"] for row in rows))
    for kind, own in rows[0]["by_type"].items():
        cells = [_cell(row["by_type"][kind]["score"]) for row in rows]
        table.add_row(printable(kind), str(own["questions"]), *cells)
    return table


def _operations(rows: Sequence[dict[str, Any]]) -> Any:
    table = plain_table(
        "operations", "calls", "seconds", "s/call", "prompt tokens", "new tokens", "adapter bytes"
    )
    for row in rows:
        for op, own in row["operations"].items():
            table.add_row(
                f"{row['name']} {op}", str(own["calls"]), f"{own['seconds']:.1f}",
                _cell(own["seconds_per_call"]), str(own["prompt_tokens"]), str(own["new_tokens"]),
                f"{own['adapter_bytes']:,}",
            )  # fmt: skip
    return table


def _differences(rows: Sequence[dict[str, Any]]) -> Any:
    others = [row for row in rows if "experts_minus" in row]
    table = plain_table("experts minus", *(row["name"] for row in others))
    kinds = list(others[0]["experts_minus"]["by_type"])
    lines: list[tuple[str, list[Any]]] = [
        (key, [row["experts_minus"].get(key) for row in others])
        for key in [*METRICS, "judged", "extract_f1"]
    ]
    lines += [
        (f"score, {printable(kind)}", [row["experts_minus"]["by_type"][kind] for row in others])
        for kind in kinds
    ]
    for title, found in lines:
        if any(found):
            table.add_row(title, *map(_interval, found))
    return table


def _interval(found: dict[str, float] | None) -> str:
    if not found:
        return "-"
    return f"{found['mean']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f})"


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
