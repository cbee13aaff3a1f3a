"""What run folders hold, read so that a torn or half-written file costs its lines and no more.

A page is most wanted of a run that went wrong: whatever cannot be read becomes a note, and the rest
is shown. Only a folder without a recipe is refused, because it is no run's.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mnemic.train.errors import UserError
from mnemic.train.folder import RunFolder
from mnemic.train.recipe.load import read_yaml

Points = list[tuple[float, float]]


@dataclass
class Run:
    """One run. `rows`: metrics by ascending step, each step once; `samples`: those of the last
    evaluation that wrote some; `notes`: what was missing or unreadable.
    """

    path: Path
    label: str
    recipe: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return max(int(self.rows[-1]["step"]) if self.rows else 0, self.summary.get("steps") or 0)

    @property
    def total_steps(self) -> int | None:
        """None where only the run itself could count them (`loop.epochs`)."""
        loop = self.recipe.get("loop")
        given = loop.get("steps") if isinstance(loop, dict) else None
        return given or self.summary.get("total_steps")

    @property
    def state(self) -> str:
        """`finished`, `finished: why early`, `stopped: why`, or `unfinished`.

        A summary tells of the session that wrote it: rows past it are of a later one that has not
        ended, as where a stopped run goes on.
        """
        if not self.summary or self.steps > (self.summary.get("steps") or 0):
            return "unfinished"
        why = self.summary.get("stopped")
        if not self.summary.get("exported"):
            return f"stopped: {why}" if why else "unfinished"
        total = self.total_steps
        if not why and total and self.steps < total:
            return "unfinished"  # finished once, and now asked for more steps
        return f"finished: {why}" if why else "finished"

    @property
    def finished(self) -> bool:
        return self.state.startswith("finished")

    @property
    def seconds(self) -> float | None:
        """Of all sessions: steps and evaluations, not imports and loading. The summary's are of the
        last session alone.
        """
        keys = ("perf/step_seconds", "perf/eval_seconds")
        found = [value for key in keys for _, value in self.points(key)]
        return sum(found) if found else self.summary.get("seconds")

    def peak(self, where: str) -> int | None:
        """Bytes; `where` is host or device. Of all sessions."""
        found = [value for _, value in self.points(f"perf/{where}_peak_bytes")]
        found.append(float(self.summary.get(f"{where}_peak_bytes") or 0))
        return int(max(found)) or None

    def points(self, key: str) -> Points:
        """(step, value) of a key, where it is a finite number."""
        return [(row["step"], float(row[key])) for row in self.rows if _number(row.get(key))]

    def ends(self, key: str) -> tuple[float | None, float | None]:
        """First and last value of a key, the first None where there is but one; the summary's
        evaluations where rows have none.
        """
        points = self.points(key)
        if points:
            return points[0][1] if len(points) > 1 else None, points[-1][1]
        first, last = (self.summary.get(f"evaluation_{end}") or {} for end in ("first", "last"))
        return first.get(key), last.get(key)

    def tokens_per_second(self) -> float | None:
        """Over all steps together."""
        timed = [row for row in self.rows if _number(row.get("perf/step_seconds"))]
        seconds = sum(row["perf/step_seconds"] for row in timed)
        tokens = sum(row["tokens"] for row in timed if _number(row.get("tokens")))
        return tokens / seconds if tokens and seconds else None


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read_run(path: str | Path) -> Run:
    """A run folder; `UserError` where it is none."""
    folder = RunFolder(Path(path))
    if not folder.recipe.is_file():
        raise UserError(
            f"{path}: not a run folder (no recipe.yaml); give the run_dir of a run, "
            "which mnemic validate RECIPE names"
        )
    recipe = read_yaml(folder.recipe)
    run = Run(folder.path, str(recipe.get("name") or folder.path.name), recipe)
    run.rows = _by_step(_lines(folder.metrics, run.notes), run.notes)
    run.summary = _summary(folder.summary, run.notes)
    samples = _lines(folder.samples, run.notes, needed=False)
    if samples:
        run.samples = [s for s in samples if s.get("step") == samples[-1].get("step")]
    return run


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Each once, in the order given; runs of the same name are told apart by their folders."""
    seen = {Path(path).resolve(): path for path in reversed(paths)}
    runs = [read_run(path) for path in reversed(seen.values())]
    names = [run.label for run in runs]
    for run in runs:
        if names.count(run.label) > 1:
            run.label = f"{run.label} ({run.path})"
    return runs


def _lines(path: Path, notes: list[str], *, needed: bool = True) -> list[dict[str, Any]]:
    """The readable objects of a JSONL file, and a note on the lines that are none."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        if needed:
            notes.append(f"{path.name}: not there; the run ended before its first step")
        return []
    except OSError as error:
        notes.append(f"{path.name}: cannot be read: {error.strerror}")
        return []
    found, torn = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and _number(row.get("step")):
            found.append(row)
        else:
            torn.append(number)
    if torn:
        shown = ", ".join(map(str, torn[:5])) + (" and more" if len(torn) > 5 else "")
        one = len(torn) == 1
        notes.append(
            f"{path.name}: line{'' if one else 's'} {shown} {'is' if one else 'are'} torn and left "
            "out (a run that was killed; it mends the file when it goes on)"
        )
    return found


def _by_step(rows: list[dict[str, Any]], notes: list[str]) -> list[dict[str, Any]]:
    """Ascending, the last of a step's rows, and a note where steps are missing."""
    found = {int(row["step"]): row for row in rows}
    if len(found) < len(rows):
        notes.append("metrics.jsonl: holds a step twice; its last row is shown")
    steps = sorted(found)
    trained = [step for step in steps if step]
    missing = trained[-1] - len(trained) if trained else 0
    if missing:
        first = next(i for i, step in enumerate(trained, 1) if step != i)
        notes.append(f"metrics.jsonl: rows of {missing} steps are missing, the first of {first}")
    return [found[step] for step in steps]


def _summary(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        notes.append("summary.json: cannot be read; the figures are those of metrics.jsonl")
        return {}
    return found
