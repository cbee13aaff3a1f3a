"""`loop.memory_budget` in a run: the choice is made before the run folder is claimed, or is the one
that the folder holds.
"""

import logging
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from mnemic.train.callbacks.console import size
from mnemic.train.errors import RecipeError, UserError
from mnemic.train.folder import RunFolder
from mnemic.train.lazy_dynamo import put_off_as_here
from mnemic.train.plan.levers import changed, inexact, ways
from mnemic.train.recipe.load import build_recipe, dump_recipe, read_yaml
from mnemic.train.recipe.recipe import Recipe

log = logging.getLogger("mnemic")

_FREE = (
    "loop.micro_batch_size", "loop.gradient_checkpointing", "loop.checkpoint_every",
    "loop.sequence_chunk", "loop.mlp_tile", "loop.loss", "offload.activations",
    "evaluation.batch_size",
)  # fmt: skip
"""Levers that may differ between a run and its continuation without making it another run."""


def check_one_process(recipe: Recipe) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"loop.memory_budget={recipe.loop.memory_budget} is for one process, whose memory the "
            "plan knows; launch one, or set it to null and choose update and offload yourself"
        )


def within_budget(recipe: Recipe, folder: RunFolder) -> Recipe:
    """The recipe with the levers that fit its budget. A folder that holds this run already has
    them; one that holds another run's is left to be refused.
    """
    if folder.used and folder.recipe.exists():
        kept = kept_choice(recipe, folder)
        if not folder.differing(kept):
            log.info("loop.memory_budget: as this run began, by %s", folder.recipe)
        return kept
    log.info("loop.memory_budget=%s: looking for what fits", recipe.loop.memory_budget)
    tree, lines = apart(dump_recipe(recipe))
    for line in lines:
        log.info("%s", line)
    return build_recipe(tree)


def apart(tree: dict) -> tuple[dict, list[str]]:
    """`choose` in a process of its own, whose memory is free again when the run begins."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=put_off_as_here()) as pool:
        return pool.submit(chosen, tree, str(Path.cwd())).result()


def chosen(tree: dict, folder: str) -> tuple[dict, list[str]]:
    """The tree of the choice for the recipe `tree`, and what to say of it."""
    from mnemic.train.plan.choose import choose

    os.chdir(folder)
    choice = choose(build_recipe(tree), more=False)
    found, grade = choice.chosen, choice.chosen.grade
    share = found.seconds / choice.given.seconds if choice.given.seconds else 1.0
    lines = [
        f"chosen for {size(choice.budget)} of {choice.place}: "
        f"{found.overrides or 'the recipe as it is'}",
        f"predicted: {size(found.need)} at the peak, {share:.2f} x the recipe's step; {grade.word}",
        *(f"note: {text}" for text in (*grade.rounds, *grade.methods)),
    ]
    return dump_recipe(found.recipe), lines


def kept_choice(recipe: Recipe, folder: RunFolder) -> Recipe:
    """The stored recipe's levers on this one; those that come closest where it is another run, so
    that the folder's refusal names what the levers do not explain.
    """
    stored, found, least = read_yaml(folder.recipe), recipe, len(folder.differing(recipe))
    for extra in (one for level in inexact(recipe) for one in level):
        for way in ways(recipe):
            overrides = {**way, **extra}
            try:
                count = len(folder.differing(changed(recipe, overrides)))
                if count > least or (count == least and found is not recipe):
                    continue
                for key in _FREE:
                    section, name = key.split(".")
                    if name in (stored.get(section) or {}):
                        overrides[key] = stored[section][name]
                found, least = changed(recipe, overrides), count
            except RecipeError:
                continue
    return found
