"""The figures of an evaluation as a table, as JSON in the form of the benchmarks, and as a plot."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mnemic.train.errors import UserError

_LINES = (
    ("op_precision", "operations right", "{:.1%}"),
    ("op_recall", "gold operations met", "{:.1%}"),
    ("unsupported_writes", "writes not borne out by their chunk", "{:.1%}"),
    ("errors_per_chunk", "errors a chunk", "{:.3f}"),
    ("generated_tokens_per_chunk", "tokens written a chunk", "{:.1f}"),
    ("seconds_per_chunk", "seconds a chunk", "{:.4f}"),
)


@dataclass
class Report:
    """Rows have `name` (manager, or a baseline), `length` (times the chunks) and the figures of
    `suite.figures`.
    """

    target: str
    suite: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    env: dict[str, Any] = field(default_factory=dict)

    def add(self, name: str, length: int, figures: dict[str, Any]) -> None:
        self.rows.append({"name": name, "length": length, **figures})

    def note(self, notes: Iterable[str]) -> None:
        """Each once."""
        self.notes += [n for n in dict.fromkeys(notes) if n not in self.notes]

    def at(self, length: int) -> dict[str, dict[str, Any]]:
        """The rows of one length by name."""
        return {row["name"]: row for row in self.rows if row["length"] == length}

    def lengths(self) -> list[int]:
        return sorted({row["length"] for row in self.rows})

    def ratios(self) -> dict[str, float]:
        """The manager's accuracy over each baseline's, and at each length over that at 1; none over
        nothing.
        """
        found = {}
        first = self.at(1)
        own = first["manager"]["accuracy"]
        for name, row in first.items():
            if name != "manager" and row["accuracy"]:
                found[f"accuracy_vs_{name.replace('-', '_')}"] = own / row["accuracy"]
        for length in self.lengths():
            if length > 1 and own:
                found[f"accuracy_x{length}_vs_x1"] = self.at(length)["manager"]["accuracy"] / own
        return found


def write(report: Report, path: Path) -> None:
    """`{"rows", "ratios", "env"}`; notes are in `env`."""
    import platform

    import torch
    import transformers

    env = {
        **report.env, "suite": report.suite, "notes": report.notes, "torch": torch.__version__,
        "transformers": transformers.__version__, "python": platform.python_version(),
        "machine": platform.machine(), "threads": torch.get_num_threads(),
    }  # fmt: skip
    # Names of rows are unique, as in the benchmarks' files.
    rows = [
        {**row, "name": row["name"] if row["length"] == 1 else f"{row['name']} x{row['length']}"}
        for row in report.rows
    ]
    text = json.dumps({"rows": rows, "ratios": report.ratios(), "env": env}, indent=1)
    path.write_text(text + "\n", "utf-8")


def show(report: Report) -> None:
    """Print it."""
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        # A table in a file or a pipe is not folded to the width rich assumes there.
        console = Console(highlight=False, markup=False, width=120)
    first = report.at(1)
    own = first["manager"]
    console.print(
        f"{report.target}: {report.suite}, {own['episodes']} episodes, {own['questions']} "
        f"questions, answered by {report.env.get('answerer', '?')}"
    )
    console.print(_accuracy_table(first))
    console.print(_type_table(first))
    if len(report.lengths()) > 1:
        console.print(_length_table(report))
    counts = own.get("operations_per_chunk", {})
    listed = ", ".join(f"{name} {value:.2f}" for name, value in counts.items()) or "none"
    console.print(f"operations a chunk: {listed}")
    for key, title, form in _LINES:
        if own.get(key) is not None:
            console.print(f"{title}: {form.format(own[key])}")
    seeds = own["accuracy_by_seed"]
    if len(seeds) > 1:
        console.print("accuracy by seed: " + ", ".join(f"{value:.3f}" for value in seeds))
    if own["episodes"] < 10:
        console.print("- few episodes: an interval over them says little")
    for note in report.notes:
        console.print(f"- {note}", soft_wrap=True)


def plain_table(*columns: str) -> Any:
    """A rich table, its first column on the left, the others' numbers on the right."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    return table


def _accuracy_table(rows: dict[str, dict[str, Any]]) -> Any:
    table = plain_table(
        "", "accuracy", "95 %", "F1", "EM", "stale", "tokens", "compression", "entries"
    )  # fmt: skip
    for name, row in rows.items():
        low, high = row["accuracy_low"], row["accuracy_high"]
        table.add_row(
            name, f"{row['accuracy']:.3f}", "-" if low is None else f"{low:.3f}-{high:.3f}",
            f"{row['f1']:.3f}", f"{row['em']:.3f}", f"{row['stale']:.3f}",
            f"{row['memory_tokens']:.1f}", f"{row['compression']:.2f}", f"{row['entries']:.1f}",
        )  # fmt: skip
    return table


def _type_table(rows: dict[str, dict[str, Any]]) -> Any:
    """Accuracy by question type."""
    table = plain_table("accuracy by type", "questions", *rows)
    for kind, own in rows["manager"]["by_type"].items():
        cells = [f"{row['by_type'][kind]['accuracy']:.3f}" for row in rows.values()]
        table.add_row(printable(kind), str(own["questions"]), *cells)
    return table


def _length_table(report: Report) -> Any:
    names = list(report.at(1))
    table = plain_table("r1 by length", "episodes", *names)
    for length in report.lengths():
        rows = report.at(length)
        cells = [f"{rows[name]['r1']:.3f}" if name in rows else "-" for name in names]
        table.add_row(f"x{length}", str(rows["manager"]["episodes"]), *cells)
    return table


def printable(text: str) -> str:
    """Types are a file's own words: no control character of theirs reaches the terminal."""
    return "".join(c if c.isprintable() else "\ufffd" for c in text)


def need_matplotlib(option: str = "--plot") -> None:
    """`UserError` where it is missing; `option` is what asks for it."""
    try:
        import matplotlib
    except ImportError:
        raise UserError(f"{option} needs matplotlib: pip install 'mnemic[plot]'") from None
    matplotlib.use("Agg")


def draw(report: Report, path: Path) -> None:
    """r1 along the lengths, or where there is one length, accuracy with its interval."""
    need_matplotlib()
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    lengths = report.lengths()
    if len(lengths) > 1:
        for name in report.at(1):
            shown = [n for n in lengths if name in report.at(n)]
            axes.plot(
                shown, [report.at(n)[name]["r1"] for n in shown], marker="o", label=name,
                linewidth=2.5 if name == "manager" else 1.2,
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"x{n}" for n in lengths])
        axes.set_xlabel("chunks, times those of the recipe")
        axes.set_ylabel("r1")
        axes.legend(fontsize=8)
    else:
        rows = report.at(1)
        heights = [row["accuracy"] for row in rows.values()]
        spread = [
            [row["accuracy"] - (low if (low := row["accuracy_low"]) is not None else height)
             for row, height in zip(rows.values(), heights, strict=True)],
            [(high if (high := row["accuracy_high"]) is not None else height) - row["accuracy"]
             for row, height in zip(rows.values(), heights, strict=True)],
        ]  # fmt: skip
        axes.bar(list(rows), heights, yerr=spread, capsize=4, color="#2e86c1")
        axes.set_ylabel("accuracy")
    axes.set_ylim(0, 1.02)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"{report.target}: {report.suite}", fontsize=10)
    figure.tight_layout()
    try:
        figure.savefig(path)
    except ValueError as error:
        raise UserError(f"--plot {path}: {error}") from None
    finally:
        pyplot.close(figure)
