"""A trial of a Weights & Biases sweep: `wandb agent` starts `mnemic train` and names the run."""

import logging
import os

from mnemic.train.recipe.recipe import Recipe
from mnemic.train.recipe.training import WandbTracking

log = logging.getLogger("mnemic")


def as_trial(recipe: Recipe) -> Recipe:
    """Under an agent, the recipe with a run folder of the trial's own, `FOLDER-RUN_ID`: all trials
    have the same name. Elsewhere the recipe itself.
    """
    sweep, run_id = os.environ.get("WANDB_SWEEP_ID"), os.environ.get("WANDB_RUN_ID")
    if not (sweep and run_id):
        return recipe
    if not isinstance(recipe.track, WandbTracking) or recipe.track.mode == "disabled":
        log.warning(
            "sweep %s: this trial is not tracked, so the sweep sees none of its metrics; "
            "set track=wandb", sweep,
        )  # fmt: skip
    return recipe.model_copy(update={"run_dir": f"{recipe.folder}-{run_id}"})
