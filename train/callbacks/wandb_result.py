"""What a wandb run holds besides the rows: plan and measurement in its summary, and once, at the
end, tables, the page of `mnemic report`, and the result as an artifact.

Curves are not drawn again: wandb draws each key of the rows. What the page of a run shows beside
curves becomes tables.
"""

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mnemic.train.callbacks.console import size
from mnemic.train.checkpoint import write_atomic
from mnemic.train.report.figures import kept_by_layer
from mnemic.train.report.page import page
from mnemic.train.report.planned import Planned
from mnemic.train.report.read import Run, read_run

log = logging.getLogger("mnemic")


def plan_summary(planned: Planned) -> dict[str, Any]:
    """`plan/...`: bytes in all and by part, or `plan/note`, why there are none."""
    found: dict[str, Any] = {}
    for where, parts in (("host", planned.host), ("device", planned.device)):
        if parts:
            found[f"plan/{where}_bytes"] = sum(parts.values())
            found |= {f"plan/{where}/{_word(part)}": nbytes for part, nbytes in parts.items()}
    if planned.peak:
        found["plan/peak"] = planned.peak
    return found | ({"plan/note": planned.note} if planned.note else {})


def result_summary(run_dir: Path, planned: Planned | None) -> dict[str, Any]:
    """Peaks of all sessions, the plan as a multiple of them, the first evaluation, and what a
    trained memory takes.
    """
    run = read_run(run_dir)
    found: dict[str, Any] = {}
    for where in ("host", "device"):
        peak = run.peak(where)
        parts = getattr(planned, where, None)
        if peak:
            found[f"measured/{where}_peak_bytes"] = peak
        if peak and parts:
            found[f"plan/{where}_over_measured"] = sum(parts.values()) / peak
    first = run.summary.get("evaluation_first") or {}
    found |= {f"first/{key}": value for key, value in first.items() if key != "step"}
    budget = run.summary.get("memory_bytes") or {}
    return found | {f"memory_bytes/{_word(part)}": nbytes for part, nbytes in budget.items()}


def _word(part: str) -> str:
    """`optimizer state` as a key."""
    return part.replace(" ", "_")


def page_of(run_dir: Path, planned: Planned | None) -> dict[str, Any]:
    """`report/...`: the page, and its tables as wandb's."""
    import wandb

    run = read_run(run_dir)
    found: dict[str, Any] = {
        "report/page": wandb.Html(page([run], [planned] if planned else None), inject=False)
    }
    for name, (columns, rows) in _tables(run, planned).items():
        if rows:
            found[f"report/{name}"] = wandb.Table(columns=columns, data=rows)
    return found


def _tables(run: Run, planned: Planned | None) -> dict[str, tuple[list[Any], list[Any]]]:
    samples = [
        [s.get("step"), *(str(s.get(key, "")) for key in ("prompt", "generated", "reference"))]
        for s in run.samples
    ]
    plan = [
        [where, part, nbytes]
        for where in ("host", "device")
        for part, nbytes in getattr(planned, where, {}).items()
    ]
    return {
        "samples": (["step", "prompt", "generated", "reference"], samples),
        "plan": (["memory", "part", "bytes"], plan),
        "kept_by_layer": (["layer", "kept"], [[x, y] for x, y in kept_by_layer(run)]),
    }


def log_artifact(
    run: Any, run_dir: Path, final: Path, *, kind: str, limit: int, name: str,
    summary: dict[str, Any],
) -> str | None:  # fmt: skip
    """Make the exported folder an artifact of type `kind`, `NAME-RUN_ID`, unless the run has one of
    the same content already; returns the digest to `remember`. Warns of a folder above `limit`
    bytes.
    """
    import wandb

    nbytes = sum(file.stat().st_size for file in final.rglob("*") if file.is_file())
    if nbytes > limit:
        log.warning(
            "track.artifact_limit: %s has %s, above %s, so it is not made an artifact; raise the "
            "limit and run the same command again", final, size(nbytes), size(limit),
        )  # fmt: skip
        return None
    last = summary.get("evaluation_last") or {}
    said = {"steps": summary["steps"], "bytes": nbytes, **last}
    artifact = wandb.Artifact(f"{name}-{run.id}", type=kind, metadata=said)
    artifact.add_dir(str(final), skip_cache=True)
    if artifact.digest in _remembered(run_dir):
        return None
    run.log_artifact(artifact, aliases=["latest", f"step-{summary['steps']}"])
    return artifact.digest


def remember(run_dir: Path, digest: str) -> None:
    """That the artifact of `digest` is logged. A run killed just before logs it again, and the
    server knows an artifact by its content.
    """
    digests = json.dumps([*_remembered(run_dir), digest])
    write_atomic(run_dir / ".wandb_artifacts", digests.encode())


def _remembered(run_dir: Path) -> list[str]:
    path = run_dir / ".wandb_artifacts"
    return json.loads(path.read_bytes()) if path.exists() else []


@contextmanager
def staged_in(folder: Path) -> Iterator[None]:
    """wandb's copies of files that wait for their upload lie in `folder`, not in the user's home:
    they are the run's, and go with it.
    """
    before = os.environ.get("WANDB_DATA_DIR")
    os.environ["WANDB_DATA_DIR"] = before or str(folder.absolute())
    try:
        yield
    finally:
        if before is None:
            del os.environ["WANDB_DATA_DIR"]
