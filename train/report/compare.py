"""`mnemic compare`: trains every cell of a grid, one after the other, each in a process of its own,
and lays them side by side.

It may be killed at any instant: finished cells stay, the one in the middle goes on from its
checkpoint, as run folders do. The cell's process dies with this one, so that a second start does
not meet it in the run folder.

FOLDER/compare.json   the grid, and what each cell reached      FOLDER/CELL/      its run folder
FOLDER/report.html    the page of all cells                     FOLDER/CELL.log   what it printed
"""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mnemic.train.callbacks.console import duration
from mnemic.train.checkpoint import write_atomic
from mnemic.train.errors import RecipeError, UserError
from mnemic.train.folder import RunFolder
from mnemic.train.recipe.load import find_recipe, read_yaml
from mnemic.train.report.command import write_page
from mnemic.train.report.grid import Cell, make_cells, manifest, parse_grid
from mnemic.train.report.markup import block, table
from mnemic.train.report.read import read_run
from mnemic.train.report.results import COLUMNS, Result, cells_of, result, show

log = logging.getLogger("mnemic")


def compare(args: Namespace) -> int:
    """The command: 0 unless a cell failed or the grid was interrupted. A refused cell is no
    failure.
    """
    varied = parse_grid(args.vary, args.overrides, args.seeds)
    path = find_recipe(args.recipe)
    tree = read_yaml(path)
    out = Path(args.out or f"runs/compare-{tree.get('name', path.stem)}")
    grid = manifest(tree, varied, args.overrides, args.seeds)
    claim = _enter(out)
    try:
        known = _known_cells(out, grid)
        cells = make_cells(str(path), varied, args.overrides, args.seeds, out)
        _announce(cells)
        _write(out, grid, known)
        errors, interrupted = _train_all(cells, str(path))
        results = [_outcome(cell, errors.get(cell.name, "")) for cell in cells]
        _write(out, grid, [vars(r) for r in results])
        _report(out, cells, results, args.plan and not interrupted)
    finally:
        claim.release()
    show(results)
    print(f"page: {out / 'report.html'}")
    if interrupted:
        log.warning("interrupted; run the same command again to go on")
    return 1 if interrupted or any(r.state == "failed" for r in results) else 0


def _enter(out: Path) -> RunFolder:
    """The grid's folder, made and locked."""
    if (out / "recipe.yaml").is_file():
        raise UserError(f"--out {out}: holds a run, not a grid; choose another --out")
    folder = RunFolder(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder.lock("--out")
    except OSError as error:
        raise UserError(
            f"--out {out}: cannot be written: {error.strerror}; choose another --out"
        ) from None
    return folder


def _known_cells(out: Path, grid: dict[str, Any]) -> list[dict[str, Any]]:
    """What the folder's file says of its cells; `UserError` where it holds another grid."""
    file = out / "compare.json"
    if not file.exists():
        return []
    try:
        old = json.loads(file.read_bytes())
        changed = [key for key in grid if old["grid"].get(key) != grid[key]]
        cells = list(old["cells"])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{file}: cannot be read as a grid's; choose another --out, or delete that file"
        ) from None
    if changed:
        raise UserError(
            f"--out {out}: holds another grid (other {', '.join(changed)}); choose another --out, "
            "or delete the folder"
        )
    return cells


def _announce(cells: Sequence[Cell]) -> None:
    """What is refused, and what switches dropped, before anything trains."""
    for cell in cells:
        if cell.refused:
            log.warning("%s: refused: %s", cell.name, cell.refused)
        for note in cell.notes if cell.recipe else ():
            log.info("note: %s: %s", cell.name, note)
    if all(cell.refused for cell in cells):
        raise RecipeError("no cell of the grid can run; the reasons stand above")


def _train_all(cells: Sequence[Cell], recipe: str) -> tuple[dict[str, str], bool]:
    """What each failed cell said, and whether the user broke off."""
    errors: dict[str, str] = {}
    todo = [cell for cell in cells if not cell.refused]
    for number, cell in enumerate(todo, 1):
        where = f"[{number}/{len(todo)}] {cell.name}"
        if _finished(cell):
            print(f"{where}: finished before")
            continue
        begun = RunFolder(cell.folder).newest() is not None
        print(f"{where}: {'goes on' if begun else 'trains'}")
        began = time.perf_counter()
        process = start_cell(["train", recipe, *cell.overrides], cell.output)
        try:
            status = process.wait()
        except KeyboardInterrupt:
            # The terminal told the cell as well: it finishes its step and saves.
            process.wait()
            return errors, True
        took = duration(time.perf_counter() - began)
        if status:
            errors[cell.name] = _last_words(cell.output, status)
            print(f"{where}: failed after {took}: {errors[cell.name]}")
        else:
            print(f"{where}: {read_run(cell.folder).state} after {took}")
    return errors, False


def start_cell(args: Sequence[str], output: Path) -> Any:
    """`mnemic ARGS` in a process; its output is added to a file. Tracked cells are one group of
    wandb runs, named as the grid's folder.
    """
    env = {"WANDB_RUN_GROUP": output.absolute().parent.name, **os.environ}
    with output.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "mnemic.train.cli", *args],
            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=env,
            preexec_fn=die_with_parent if sys.platform == "linux" else None,
        )  # fmt: skip


def die_with_parent() -> None:
    """In a child: be killed when the parent is, however that ends (Linux)."""
    import ctypes

    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _finished(cell: Cell) -> bool:
    return (cell.folder / "recipe.yaml").is_file() and read_run(cell.folder).finished


def _last_words(log_file: Path, status: int) -> str:
    """The last line that the cell printed, or the signal that ended it."""
    if status < 0:
        return f"ended by {signal.Signals(-status).name}; its output is in {log_file}"
    lines = log_file.read_text("utf-8", "replace").split("\n")
    words = [line.removeprefix("mnemic: ").strip() for line in lines if line.strip()]
    return words[-1] if words else f"exit status {status}; it printed nothing"


def _outcome(cell: Cell, error: str) -> Result:
    if cell.refused:
        return Result(cell.name, list(cell.setting), cell.seed, "refused", reason=cell.refused)
    if not (cell.folder / "recipe.yaml").is_file():
        state = "failed" if error else "unfinished"
        return Result(cell.name, list(cell.setting), cell.seed, state, reason=error)
    return result(read_run(cell.folder), list(cell.setting), cell.seed, error)


def _write(out: Path, grid: dict[str, Any], cells: Sequence[dict[str, Any]]) -> None:
    text = json.dumps({"grid": grid, "cells": list(cells)}, indent=1)
    write_atomic(out / "compare.json", text.encode())


def _report(out: Path, cells: Sequence[Cell], results: Sequence[Result], plan: bool) -> None:
    """The page of the cells that have a run folder."""
    held = [c for c in cells if not c.refused and (c.folder / "recipe.yaml").is_file()]
    if not held:
        return
    reasons = "".join(
        block("p", f"{r.cell}: {r.state}: {r.reason}", "dim bad") for r in results if r.reason
    )
    head = block("h2", "Cells of the grid") + table(COLUMNS, cells_of(results)) + reasons
    runs = [read_run(cell.folder) for cell in held]
    write_page(runs, out / "report.html", plan=plan, title=f"compare: {out.name}", head=head)
