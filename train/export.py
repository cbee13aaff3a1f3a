"""Trained weights as plain HF or PEFT folders, and trained models back from run folders."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mnemic.train.checkpoint import fsync_folder, list_checkpoints, verify
from mnemic.train.errors import UserError
from mnemic.train.folder import open_run
from mnemic.train.recipe.recipe import Recipe


def export_model(trainer: Any, tokenizer: Any, target: Path) -> None:
    """Write the trainer's model and its tokenizer to `target`, replacing it whole."""
    trainer.accelerator.wait_for_everyone()
    # Sharded weights are gathered by all ranks together; others are where they are.
    state = trainer.accelerator.get_state_dict(trainer.model) if trainer.sharded else None
    if trainer.is_main:
        write_model(trainer.module, tokenizer, target, state=state)
    trainer.accelerator.wait_for_everyone()


def write_model(model: Any, tokenizer: Any, target: Path, *, state: Any = None) -> None:
    """`save_pretrained` into a temp folder, then into place."""
    from mnemic.models.int8 import dense_state

    with replace_folder(target) as temp:
        if state is None:
            # Int8 weights leave as dense ones of the model's dtype.
            state = dense_state(model)
        model.save_pretrained(temp, **({"state_dict": state} if state is not None else {}))
        tokenizer.save_pretrained(temp)


@contextmanager
def replace_folder(target: Path) -> Iterator[Path]:
    """A temp folder to fill, which then takes `target`'s place; a failure leaves that alone."""
    temp = target.with_name(f".tmp-{target.name}")
    shutil.rmtree(temp, ignore_errors=True)
    try:
        temp.mkdir(parents=True)
        yield temp
    except Exception as error:
        # safetensors, tokenizers and the file system each have a type for a failed write.
        shutil.rmtree(temp, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"the model could not be exported to {target}: {reason}") from error
    if target.exists():
        shutil.rmtree(target)
    os.rename(temp, target)
    fsync_folder(target.parent)


def load_run(run_dir: str, checkpoint: str | None = None) -> tuple[Any, Any, Recipe]:
    """(model, tokenizer, recipe) of a run: its final export, else its newest (or the given)
    checkpoint.
    """
    from mnemic.train.build import build_model, build_tokenizer
    from mnemic.train.state import load_trained

    folder, recipe = open_run(run_dir)
    source = Path(checkpoint) if checkpoint else None
    if source is None:
        found = list_checkpoints(folder.checkpoints)
        best = (folder.read_summary() or {}).get("best_step")
        wants_best = recipe.evaluation is not None and recipe.evaluation.export_best
        steps = dict(found)
        if wants_best and folder.final.is_dir() and best in steps:
            source = steps[best]
        elif found:
            source = found[-1][1]
        else:
            raise UserError(f"{run_dir}: has no checkpoint yet; train it first")
    verify(source)
    if not (source / "model.safetensors").is_file():
        raise UserError(
            f"{source}: was written by a sharded engine; use {folder.final} with from_pretrained"
        )
    tokenizer = build_tokenizer(recipe)
    model = build_model(recipe, tokenizer)
    load_trained(model, source / "model.safetensors")
    model.eval()
    return model, tokenizer, recipe


def export_run(run_dir: str, target: str, *, checkpoint: str | None, merge: bool) -> Path:
    """Export a run to a new folder; `merge` folds adapters into the base model."""
    out = Path(target)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already; give a new folder")
    model, tokenizer, recipe = load_run(run_dir, checkpoint)
    if merge:
        if recipe.adapters.kind == "none":
            raise UserError(
                "--merge: this run trained the model itself, there are no adapters to merge"
            )
        if recipe.adapters.kind == "qlora":
            raise UserError(
                "--merge: a 4-bit base cannot take the adapter exactly; "
                "export the adapter and merge it into the full-precision model"
            )
        model = model.merge_and_unload()
    if out.is_dir():
        out.rmdir()
    write_model(model, tokenizer, out)
    return out
