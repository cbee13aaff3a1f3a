"""The plan of a run that is tracked, made before it begins and kept in its folder as plan.json.

It is made in a process of its own, whose memory is free again when training begins: what the run
then measures is the run's alone.
"""

import json
import logging
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mnemic.train.checkpoint import write_atomic
from mnemic.train.lazy_dynamo import put_off_as_here
from mnemic.train.recipe.load import build_recipe, dump_recipe
from mnemic.train.recipe.recipe import Recipe
from mnemic.train.report.planned import Planned, plan_of, takes_memory

log = logging.getLogger("mnemic")


def kept_plan(recipe: Recipe, folder: Path) -> Planned:
    """That of plan.json where it is of a recipe that takes the same memory, or a new one."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return Planned(note="not planned: the plan is of one process, and this run has several")
    path, tree = folder / "plan.json", dump_recipe(recipe)
    if path.exists():
        kept = json.loads(path.read_bytes())
        if kept.pop("of") == takes_memory(tree):
            return Planned(**kept)
    log.info("track.plan: planning the run")
    try:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context, initializer=put_off_as_here()) as pool:
            planned = pool.submit(_planned, tree, str(Path.cwd())).result()
    except BrokenProcessPool:
        # Planning is beside the point of a run; a machine too full for it may still train.
        log.warning("track.plan: the process that plans was ended by the system; no plan is kept")
        return Planned(note="not planned: the process that plans was ended by the system")
    text = json.dumps({"of": takes_memory(tree), **asdict(planned)}, indent=1)
    write_atomic(path, text.encode())
    return planned


def _planned(tree: dict[str, Any], folder: str) -> Planned:
    os.chdir(folder)
    return plan_of(build_recipe(tree))
