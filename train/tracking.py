"""What a run needs of `track`. Nothing of the tracker is imported where there is none."""

from typing import TYPE_CHECKING

from mnemic.train.folder import RunFolder
from mnemic.train.recipe.load import dump_recipe
from mnemic.train.recipe.recipe import Recipe
from mnemic.train.recipe.training import WandbTracking

if TYPE_CHECKING:
    from mnemic.train.callbacks.wandb import WandbCallback
    from mnemic.train.report.planned import Planned


def tracked_plan(recipe: Recipe, folder: RunFolder) -> "Planned | None":
    """The plan that the tracker shows; before anything heavy is in this process."""
    track = recipe.track
    if not isinstance(track, WandbTracking) or not track.plan:
        return None
    from mnemic.train.callbacks.wandb import resolve_mode
    from mnemic.train.report.kept_plan import kept_plan

    return None if resolve_mode(track.mode) == "disabled" else kept_plan(recipe, folder.path)


def build_tracker(
    recipe: Recipe, folder: RunFolder, planned: "Planned | None"
) -> "WandbCallback | None":
    track = recipe.track
    if not isinstance(track, WandbTracking):
        return None
    from mnemic.train.callbacks.wandb import WandbCallback

    kind = "model" if recipe.adapters.kind == "none" else "adapter"
    wanted = track.artifacts == "all" or (track.artifacts == "adapters" and kind == "adapter")
    return WandbCallback(
        run_dir=folder.path, metrics=folder.metrics, config=dump_recipe(recipe),
        run_name=recipe.name, project=track.project, entity=track.entity, tags=list(track.tags),
        mode=track.mode, planned=planned, kind=kind if wanted else None,
        limit=track.artifact_limit,
    )  # fmt: skip
