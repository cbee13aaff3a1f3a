"""Tries cells of the combination matrix: is the recipe refused, and if not, does it train?

    torchrun --nproc_per_node 2 scripts/matrix_try.py JOBS.json OUT

is the worker of cells with several ranks, and does many of them in one group of processes, since
starting one takes seconds. Rank r appends a line for each cell to OUT.r. A cell that fails ends the
worker: ranks that have parted cannot go on together.
"""

import io
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

from matrix_cells import OPERATIONS, STEPS, Cell, Materials, make_materials, tree_of

from mnemic.train.errors import RecipeError, UserError
from mnemic.train.preflight import check_data, check_environment
from mnemic.train.recipe.load import build_recipe
from mnemic.train.recipe.recipe import Recipe

# The cells' activations are as small as their models: in a real run less than this stays in memory.
MINIMUM = 1 << 10
PATIENCE = 60
"""Seconds that a rank waits for another."""


@dataclass
class Result:
    """`status`: ran, refused (for `reasons`, before a model was built) or failed."""

    cell: Cell
    status: str
    reasons: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def line(self) -> str:
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def read(cls, line: str) -> "Result":
        values = json.loads(line)
        return cls(Cell(*values.pop("cell")), **values)


def judge(cell: Cell, made: Materials, run_dir: Path) -> Recipe | Result:
    """The cell's recipe, or why it is refused: what `mnemic validate` finds, and `mnemic train` on
    so many processes before anything else.
    """
    try:
        recipe = build_recipe(tree_of(cell, made, run_dir))
    except RecipeError as error:
        return Result(cell, "refused", error.problems)
    try:
        with patch.dict(os.environ, {"WORLD_SIZE": str(cell.ranks)}):
            check_environment(recipe)
        check_data(recipe)
    except UserError as error:
        return Result(cell, "refused", [str(error)])
    return recipe


def attempt(cell: Cell, made: Materials, folder: Path) -> Result:
    """Judge the cell, and train it in `folder`, which is removed again."""
    began = time.perf_counter()
    recipe = judge(cell, made, folder)
    if isinstance(recipe, Result):
        return recipe
    result = Result(cell, "ran")
    try:
        with _warnings(result.warnings):
            _train(recipe)
        if os.environ.get("RANK", "0") == "0":
            result.reasons = _examine(cell, recipe, result)
    except Exception as error:
        traceback.print_exc()
        result.reasons = [f"{type(error).__name__}: {error}"]
    finally:
        if os.environ.get("RANK", "0") == "0":
            shutil.rmtree(folder, ignore_errors=True)
    if result.reasons:
        result.status = "failed"
    result.seconds = time.perf_counter() - began
    return result


def _train(recipe: Recipe) -> None:
    from rich.console import Console

    from mnemic.train.offload import saved
    from mnemic.train.run import run

    with patch.object(saved, "MINIMUM", MINIMUM):
        run(recipe, Console(file=io.StringIO()))


@contextmanager
def _warnings(into: list[str]) -> Iterator[None]:
    """What the run says at warning level."""

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            into.append(record.getMessage())

    handler, log = Keep(logging.WARNING), logging.getLogger("mnemic")
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


def _examine(cell: Cell, recipe: Recipe, result: Result) -> list[str]:
    """What is wrong with a run that went through: losses, and parts that did nothing unsaid."""
    found = []
    lines = (Path(recipe.folder) / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["step"]]
    result.losses = [row["loss"] for row in rows]
    result.norms = [row["grad_norm"] for row in rows]
    if len(rows) != STEPS or not all(map(math.isfinite, result.losses)):
        found.append(f"losses {result.losses} of {STEPS} steps")
    if not any(norm > 0 for norm in result.norms):
        found.append("no gradient in any step")
    if cell.tokens == "on" and not all(row["tokens/kept"] < 1 for row in rows):
        found.append("tokens: nothing was dropped")
    still = _unchanged(cell, recipe)
    if still:
        found.append(f"weights that did not change: {', '.join(still)}")
    return found


def _unchanged(cell: Cell, recipe: Recipe) -> list[str]:
    """Names of trained tensors that the exported result has as they were drawn."""
    import torch
    from safetensors.torch import load_file

    from mnemic.train.build import build_model, run_tokenizer

    logging.disable(logging.INFO)
    try:
        model = build_model(recipe, run_tokenizer(recipe, Path(recipe.folder)))
    finally:
        logging.disable(logging.NOTSET)
    final, still = Path(recipe.folder) / "final", []
    experts = OPERATIONS if cell.adapters == "bank" else ("default",)
    for expert in experts:
        path = final / "model.safetensors"
        if cell.adapters != "none":
            path = (final / expert if len(experts) > 1 else final) / "adapter_model.safetensors"
        trained = load_file(path)
        for name, param in model.named_parameters():
            mine = cell.adapters == "none" or f".{expert}." in name
            if param.requires_grad and mine:
                # peft leaves the adapter's name out of its files.
                saved = trained[name.replace(f".{expert}.", ".")]
                if torch.equal(saved, param.detach()):
                    still.append(name)
    return still


def try_cells(
    cells: list[Cell], folder: Path, tell: Callable[[str], Any] = lambda line: None
) -> list[Result]:
    """Every cell's result, in order: those of one rank in this process. `tell` hears how far."""
    made = make_materials(folder, lambda tree: _train(build_recipe(tree)))
    results: dict[Cell, Result] = {}
    for number, cell in enumerate(cells):
        if cell.ranks == 1:
            results[cell] = attempt(cell, made, folder / f"cell-{number}")
        elif isinstance(verdict := judge(cell, made, folder / "none"), Result):
            results[cell] = verdict
        if number % 200 == 199:
            tell(f"{number + 1} of {len(cells)} cells, those of several ranks aside")
    several = [cell for cell in cells if cell not in results]
    tell(f"{len(several)} cells of several ranks")
    results |= {result.cell: result for result in _try_ranks(several, made, folder)}
    return [results[cell] for cell in cells]


def _try_ranks(cells: list[Cell], made: Materials, folder: Path) -> Iterator[Result]:
    """Results of the worker, which is started again where a cell has ended it."""
    left = list(cells)
    while left:
        jobs, out = folder / "jobs.json", folder / "results"
        jobs.write_text(json.dumps({"folder": str(made.folder), "cells": left}))
        for path in folder.glob("results.*"):
            path.unlink()
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
             __file__, str(jobs), str(out)],
            capture_output=True, text=True,
        )  # fmt: skip
        paths = [Path(f"{out}.{rank}") for rank in range(2)]
        parts = [path.read_text().splitlines() if path.exists() else [] for path in paths]
        results = [Result.read(line) for line in parts[0]]
        failed = [r for part in parts for r in map(Result.read, part) if r.status == "failed"]
        yield from (result for result in results if result.status != "failed")
        seen = {result.cell for result in results if result.status != "failed"}
        if failed:
            # Where one rank fails, the other one's reason is how it waited.
            cell = failed[0].cell
            yield Result(cell, "failed", [reason for r in failed for reason in r.reasons])
            seen.add(cell)
        elif len(seen) < len(left):
            cell = next(cell for cell in left if cell not in seen)
            reason = done.stderr[-2000:] or f"the worker ended with {done.returncode}"
            yield Result(cell, "failed", [reason])
            seen.add(cell)
        left = [cell for cell in left if cell not in seen]


def _work(jobs: Path, out: str) -> int:
    import torch.distributed as dist
    from accelerate.state import PartialState

    dist.init_process_group("gloo", timeout=timedelta(seconds=PATIENCE))
    rank, work = dist.get_rank(), json.loads(jobs.read_text())
    made = Materials(Path(work["folder"]))
    # The end of a run ends its processes' group, and here the next run needs it.
    with (
        patch.object(PartialState, "destroy_process_group", lambda self, group=None: None),
        open(f"{out}.{rank}", "a", buffering=1) as file,
    ):
        for number, values in enumerate(work["cells"]):
            result = attempt(Cell(*values), made, made.folder / f"ranks-{number}")
            file.write(result.line())
            if result.status == "failed":
                return 1
            dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    # At once: a rank that waits for this one should not.
    code = _work(Path(sys.argv[1]), sys.argv[2])
    sys.stdout.flush()
    os._exit(code)
