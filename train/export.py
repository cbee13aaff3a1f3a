"""Trained weights as plain HF or PEFT folders, and trained models back from run folders."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mnemic.models.memory.episode import MemoryConfig
from mnemic.train.checkpoint import list_checkpoints, verify
from mnemic.train.errors import UserError
from mnemic.train.folder import open_run, replace_folder
from mnemic.train.recipe.recipe import Recipe


def export_model(
    trainer: Any, tokenizer: Any, target: Path, *, memory: MemoryConfig | None = None,
    recipe: Recipe | None = None,
) -> None:  # fmt: skip
    """Write the trainer's model and its tokenizer to `target`, replacing it whole; `memory`: how it
    manages one, as memory.json; `recipe`: what a bank's bank.json names of it.
    """
    from mnemic.train.sharded import gather

    trainer.accelerator.wait_for_everyone()
    # Sharded weights are gathered by all ranks together; others are where they are.
    state = None
    if trainer.engine == "fsdp2":
        state = gather(trainer.module, keep=trainer.is_main)
    elif trainer.sharded:
        state = trainer.accelerator.get_state_dict(trainer.model)
    if trainer.is_main:
        write_model(trainer.module, tokenizer, target, state=state, memory=memory, recipe=recipe)
    trainer.accelerator.wait_for_everyone()


def write_model(
    model: Any, tokenizer: Any, target: Path, *, state: Any = None,
    memory: MemoryConfig | None = None, recipe: Recipe | None = None,
) -> None:  # fmt: skip
    """`save_pretrained` into a temp folder, then into place. A bank: a PEFT folder for each
    operation, and bank.json with its operations and their base.
    """
    from mnemic.models.int8 import dense_state

    with replace_folder(target) as temp:
        if state is None:
            # Int8 weights leave as dense ones of the model's dtype.
            state = dense_state(model)
        bank = getattr(model, "expert_bank", None)
        if bank is not None:
            write_bank(bank, temp, recipe)
        else:
            model.save_pretrained(temp, **({"state_dict": state} if state is not None else {}))
        tokenizer.save_pretrained(temp)
        if memory is not None:
            (temp / "memory.json").write_text(json.dumps(asdict(memory), indent=1) + "\n")


def write_bank(bank: Any, folder: Path, recipe: Recipe | None) -> None:
    """The bank's folders, and bank.json: its operations, and which base they are over."""
    bank.save(folder)
    named: dict[str, Any] = {"operations": list(bank.operations)}
    if recipe is not None:
        named |= {"model": recipe.model.model_dump(mode="json"), "seed": recipe.loop.seed}
    (folder / "bank.json").write_text(json.dumps(named, indent=1) + "\n", encoding="utf-8")


def load_run(
    run_dir: str, checkpoint: str | None = None, *, in_memory: bool = False
) -> tuple[Any, Any, Recipe]:
    """(model, tokenizer, recipe) of a run at its newest (or the given) checkpoint, a streamed one
    at its last commit. A streamed model stays where it is, unless `in_memory` (adapters only).
    """
    from mnemic.train.build import build_model, run_tokenizer
    from mnemic.train.sharded import load_weights

    folder, recipe = open_run(run_dir)
    streamed = recipe.update.kind == "streamed"
    full = recipe.adapters.kind == "none"
    source = Path(checkpoint) if checkpoint else None
    given = source is not None
    if source is None:
        found = list_checkpoints(folder.checkpoints)
        best = (folder.read_summary() or {}).get("best_step")
        wants_best = recipe.evaluation is not None and recipe.evaluation.export_best
        steps = dict(found)
        if wants_best and folder.final.is_dir() and best in steps:
            source, given = steps[best], True
        elif found:
            source = found[-1][1]
        elif not (streamed and full):
            raise UserError(f"{run_dir}: has no checkpoint yet; train it first")
    if streamed and not in_memory:
        from mnemic.train.offload.run import load_streamed

        tokenizer = run_tokenizer(recipe, folder.path)
        loaded = load_streamed(recipe, tokenizer, folder.path, source, given=given)
        loaded.model.eval()
        loaded.model.streamed = loaded  # stays open as long as the model is there
        return loaded.model, tokenizer, recipe
    assert source is not None
    verify(source)
    if (source / "accelerate").is_dir():
        raise UserError(
            f"{source}: was written by DeepSpeed; use {folder.final} with from_pretrained"
        )
    tokenizer = run_tokenizer(recipe, folder.path)
    model = build_model(recipe, tokenizer)
    load_weights(model, source)
    model.eval()
    return model, tokenizer, recipe


def average_checkpoints(model: Any, folder: Path, count: int) -> None:
    """Put the mean, in fp32, of the newest `count` checkpoints' weights into `model` (MemSifter,
    arXiv 2603.03379, averages three). Too few, or ones of DeepSpeed, are a `UserError`.
    """
    import torch

    from mnemic.train.sharded import load_weights
    from mnemic.train.state import trained_tensors

    found = [path for _, path in list_checkpoints(folder)][-count:]
    if count < 2 or len(found) < count:
        raise UserError(
            f"--average {count}: {folder} holds {len(list_checkpoints(folder))} checkpoints; give "
            "2 or more, as many as there are, and keep them with loop.keep_checkpoints"
        )
    sums: dict[str, Any] = {}
    for path in found:
        verify(path)
        if (path / "accelerate").is_dir():
            raise UserError(f"{path}: was written by DeepSpeed; --average cannot read it")
        load_weights(model, path)
        for name, tensor in trained_tensors(model).items():
            if not tensor.is_floating_point():
                raise UserError(f"{path}: {name} is {tensor.dtype}; --average needs real weights")
            sums[name] = tensor.float() + sums.get(name, 0.0)
    with torch.no_grad():
        for name, tensor in trained_tensors(model).items():
            tensor.copy_(sums[name] / count)


def export_run(
    run_dir: str, target: str, *, checkpoint: str | None, merge: bool, average: int = 1
) -> Path:
    """Export a run to a new folder; `merge` folds adapters into the base model, `average` takes the
    mean of that many checkpoints.
    """
    out = Path(target)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already; give a new folder")
    folder, recipe = open_run(run_dir)
    if average > 1 and (checkpoint or recipe.update.kind == "streamed"):
        raise UserError(
            f"--average {average} takes the newest checkpoints of a run that is not streamed; "
            "leave --checkpoint out"
        )
    if merge and recipe.adapters.kind == "bank":
        raise UserError(
            "--merge: a bank's experts answer different prompts, and one model cannot be all of "
            "them; export the bank, and merge one expert of it with peft's merge_and_unload"
        )
    if merge and recipe.adapters.kind == "none":
        raise UserError(
            "--merge: this run trained the model itself, there are no adapters to merge"
        )
    low_bit = recipe.adapters.kind == "qlora" or getattr(recipe.offload, "base", "full") != "full"
    if merge and low_bit:
        raise UserError(
            "--merge: a base in few bits cannot take the adapter exactly; "
            "export the adapter and merge it into the full-precision model"
        )
    model, tokenizer, recipe = load_run(run_dir, checkpoint, in_memory=merge)
    if average > 1:
        average_checkpoints(model, folder.checkpoints, average)
    if merge:
        model = model.merge_and_unload()
    if out.is_dir():
        out.rmdir()
    streamed = getattr(model, "streamed", None)
    if streamed is not None and recipe.adapters.kind == "none":
        from mnemic.train.offload.run import export_engine

        with replace_folder(out) as temp:
            export_engine(streamed.engine, model, temp)
            tokenizer.save_pretrained(temp)
        return out
    memory = MemoryConfig(**recipe.memory.model_dump()) if recipe.memory else None
    if streamed is not None:
        streamed.name_base()
    write_model(model, tokenizer, out, memory=memory, recipe=recipe)
    return out
