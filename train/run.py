"""One run from a recipe: check, claim the folder, build, resume, fit, export, sum up."""

import json
import logging
import math
import time
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mnemic.train.accelerator import check_shared, make_accelerator
from mnemic.train.checkpoint import list_checkpoints, write_atomic
from mnemic.train.errors import UserError
from mnemic.train.folder import RunFolder
from mnemic.train.launch import check_resume, micro_batch_size
from mnemic.train.plan.budget import check_one_process, within_budget
from mnemic.train.preflight import (
    check_data,
    check_environment,
    is_main_process,
)
from mnemic.train.recipe.distill import DistillObjective
from mnemic.train.recipe.memory import GrpoObjective
from mnemic.train.recipe.model import Bank
from mnemic.train.recipe.recipe import Recipe
from mnemic.train.recipe.training import InBackwardUpdate as InBackwardPart
from mnemic.train.recipe.training import Loop
from mnemic.train.recipe.training import StreamedUpdate as StreamedPart
from mnemic.train.tracking import build_tracker, tracked_plan

if TYPE_CHECKING:
    from mnemic.train.offload.work import WorkFolders
    from mnemic.train.report.planned import Planned

log = logging.getLogger("mnemic")


def run(recipe: Recipe, console: Any) -> dict[str, Any]:
    """Train as the recipe says; returns the summary that `summary.json` holds."""
    folder = RunFolder(Path(recipe.folder))
    start: Path | None = None
    if recipe.loop.memory_budget is not None:
        check_one_process(recipe)
    if is_main_process():
        check_environment(recipe)
        for note in check_data(recipe):
            log.info(note)
        if recipe.loop.memory_budget is not None:
            recipe = within_budget(recipe, folder)
        start = folder.claim(recipe)
    planned = tracked_plan(recipe, folder) if is_main_process() else None
    work = None
    try:
        check_resume(start)
        if isinstance(recipe.update, StreamedPart):
            from mnemic.train.offload.work import work_folders

            work = work_folders(recipe, folder.path)
            work.claim()
        from mnemic.train.offload.memory import bound_kernels, settle_malloc

        bound_kernels()
        if recipe.settles_heap:
            settle_malloc()
        with ExitStack() as stack:
            return _run(recipe, folder, start, console, work, stack, planned)
    finally:
        if work is not None:
            work.release()
        folder.release()


def _run(
    recipe: Recipe, folder: RunFolder, start: Path | None, console: Any,
    work: "WorkFolders | None", stack: ExitStack, planned: "Planned | None",
) -> dict[str, Any]:  # fmt: skip
    began = time.perf_counter()
    # torch and transformers take seconds to import: not before the checks above.
    from accelerate import DistributedType

    from mnemic.train.build import (
        build_evaluation,
        build_model,
        check_length,
        run_tokenizer,
    )
    from mnemic.train.callbacks.base import Callback
    from mnemic.train.callbacks.console import ConsoleCallback
    from mnemic.train.callbacks.memory import MemoryCallback
    from mnemic.train.callbacks.metrics import MetricsFile
    from mnemic.train.callbacks.tokens import TokensCallback
    from mnemic.train.export import export_model
    from mnemic.train.in_backward import InBackwardUpdate
    from mnemic.train.objectives.base import Objective
    from mnemic.train.objectives.build import memory_config, train_stream
    from mnemic.train.objectives.grpo import PolicyObjective
    from mnemic.train.objectives.teacher import distillation
    from mnemic.train.objectives.tokens import TokenObjective, keeps_packed_rows_apart
    from mnemic.train.offload.saved import saved_activations
    from mnemic.train.optimizers import build_optimizer
    from mnemic.train.plan.fits import check_fits
    from mnemic.train.rollout.build import build_player, build_policy
    from mnemic.train.state import autocast_of
    from mnemic.train.tokens import install_tokens
    from mnemic.train.trainer import Trainer
    from mnemic.train.update import DeepSpeedUpdate, PlainUpdate

    streamed: Any = None
    joint = isinstance(recipe.adapters, Bank) and len(recipe.adapters.operations) > 1
    accelerator = make_accelerator(recipe.loop, unused=joint)
    check_shared(accelerator, folder.path)
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        (start,) = broadcast_object_list([start])
    micro = micro_batch_size(recipe, accelerator.num_processes)
    num_batches = max(1, recipe.loop.batch_size // (micro * accelerator.num_processes))
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # The engine counts by itself and must be told what the recipe says.
        accelerator.state.deepspeed_plugin.deepspeed_config.update(
            train_micro_batch_size_per_gpu=micro,
            gradient_accumulation_steps=num_batches,
            gradient_clipping=recipe.update.max_grad_norm or 0.0,
        )

    # Rank 0 first: a model that must be fetched is fetched once.
    with accelerator.main_process_first():
        tokenizer = run_tokenizer(recipe, folder.path, keep=True)
        check_fits(recipe, tokenizer, accelerator.device)
        if work is None:
            model = build_model(recipe, tokenizer)
        else:
            from mnemic.train.offload.run import StreamedRun

            streamed = StreamedRun(recipe, tokenizer, accelerator.device, work)
            stack.callback(streamed.close, folder.path)
            streamed.load(start, folder)
            model = streamed.model
    sparsity = install_tokens(recipe, model, tokenizer)
    check_length(recipe, model)
    total_steps = count_steps(recipe, tokenizer)
    grpo = isinstance(recipe.objective, GrpoObjective)
    streams = None
    if not grpo:
        streams = train_stream(recipe, tokenizer, quiet=not accelerator.is_main_process)
    if streams and streams.packed and not keeps_packed_rows_apart(model):
        raise UserError(
            f"objective.packing=true: {type(model).__name__} lets packed rows see each other; "
            "set it to false"
        )
    if streamed:
        peak_optimizer = streamed.optimizer
    else:
        peak_optimizer = build_optimizer(recipe.optimizer, model, seed=recipe.loop.seed)
    in_backward = isinstance(recipe.update, InBackwardPart)
    if in_backward and grpo:
        log.warning(
            "update.kind=in_backward holds all gradients until the last micro-batch, and rollouts "
            "give one for each %d turns (loop.micro_batch_size); raise that to save their memory",
            micro,
        )
    elif in_backward and num_batches > 1:
        log.warning(
            "update.kind=in_backward with %d micro-batches holds all gradients until the last one; "
            "it saves their memory with one micro-batch (loop.micro_batch_size=%d)",
            num_batches, micro * num_batches,
        )  # fmt: skip
    # In-backward updates average over ranks themselves: no DDP wrapper, no buckets.
    if streamed:
        # Its parameters have no memory that could be moved to the device.
        optimizer = peak_optimizer
    elif in_backward:
        model = accelerator.prepare_model(model, evaluation_mode=True)
        optimizer = accelerator.prepare_optimizer(peak_optimizer)
    else:
        model, optimizer = accelerator.prepare(model, peak_optimizer)
    plain = accelerator.unwrap_model(model)
    autocast = partial(autocast_of, accelerator.device, recipe.loop.precision)
    if streams:
        make: Any = TokenObjective
        if isinstance(recipe.objective, DistillObjective):
            make = distillation(recipe, plain, tokenizer, accelerator, autocast)
        objective: Objective = make(
            streams.stream, batch_size=recipe.loop.batch_size, micro_batch_size=micro,
            pad_id=tokenizer.pad_token_id, packed=streams.packed, bad=streams.bad,
            rank=accelerator.process_index, world=accelerator.num_processes,
        )  # fmt: skip
    else:
        objective = build_policy(recipe, plain, tokenizer, accelerator, folder.path, autocast)

    memory = MemoryCallback()
    shared = (
        {"generator": objective.generator, "answerer": objective.answerer}
        if isinstance(objective, PolicyObjective)
        else {}
    )
    player = build_player(recipe, plain, tokenizer, folder.path, **shared)
    evaluation = build_evaluation(recipe, tokenizer, objective, folder.samples, player)
    callbacks: list[Callback] = [
        *([evaluation] if evaluation else []),
        memory,
        *([TokensCallback(*sparsity)] if sparsity else []),
        MetricsFile(folder.metrics),
        ConsoleCallback(console),
    ]
    tracker = build_tracker(recipe, folder, planned)
    if tracker:
        stack.callback(tracker.finish)
        callbacks.append(tracker)
    max_grad_norm = recipe.update.max_grad_norm
    if streamed:
        update: Any = streamed.update(accelerator)
    elif isinstance(recipe.update, InBackwardPart):
        clip = recipe.update.clip
        update = InBackwardUpdate(accelerator, model, optimizer, clip, max_grad_norm)
    elif accelerator.distributed_type == DistributedType.DEEPSPEED:
        update = DeepSpeedUpdate(accelerator, model, optimizer, num_batches)
    else:
        update = PlainUpdate(accelerator, model, optimizer, max_grad_norm)
    if not streamed:
        update.saving = saved_activations(recipe, model, accelerator, folder.path, stack)
    trainer = Trainer(
        accelerator=accelerator, model=model, optimizer=optimizer, objective=objective,
        update=update,
        lr_at=make_schedule(recipe.loop, total_steps), total_steps=total_steps,
        checkpoints=folder.checkpoints, callbacks=callbacks, seed=recipe.loop.seed,
        precision=recipe.loop.precision, save_every=recipe.loop.save_every,
        keep_checkpoints=recipe.loop.keep_checkpoints,
    )  # fmt: skip
    if streamed:
        taken = streamed.resume(trainer, start)
        if taken:
            log.info("resuming from %s (step %d of %d)", taken, trainer.step, total_steps)
    elif start:
        trainer.resume(start)
        log.info("resuming from %s (step %d of %d)", start, trainer.step, total_steps)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    held = sum(p.numel() for p in model.parameters())
    log.info("training %s of %s parameters on %s, %d steps of %d rows (%d at once)",
             f"{trained:,}", f"{held:,}", accelerator.device, total_steps,
             recipe.loop.batch_size, micro)  # fmt: skip
    ran_from = trainer.step
    trainer.fit()

    summary = {
        "name": recipe.name,
        "prompt_form": prompt_form(recipe),
        "steps": trainer.step,
        "total_steps": total_steps,
        "stopped": trainer.stop_reason,
        "trained_parameters": trained,
        "parameters": held,
        "tokens_seen": trainer.tokens_seen,
        "evaluation_first": evaluation.first if evaluation else None,
        "evaluation_last": evaluation.latest if evaluation else None,
        "best_step": evaluation.best_step if evaluation else None,
        "host_peak_bytes": memory.host_peak,
        "device_peak_bytes": memory.device_peak or None,
        "seconds": time.perf_counter() - began,
        "exported": None,
    }
    if recipe.memory is not None or recipe.adapters.kind == "bank":
        summary["memory_bytes"] = memory_bytes(recipe, plain, optimizer, evaluation)
    signalled = (trainer.stop_reason or "").startswith("signal")
    if not signalled:
        if ran_from == trainer.step and folder.summary.exists() and folder.final.is_dir():
            # Nothing was left to do: the figures of the run that did it stand.
            summary = folder.read_summary() or summary
            if tracker:
                tracker.finish(summary, folder.final)
            return summary
        _load_best(trainer, recipe, evaluation)
        if streamed:
            streamed.export(folder.final)
        else:
            export_model(
                trainer, tokenizer, folder.final, memory=memory_config(recipe),
                recipe=recipe,
            )  # fmt: skip
        summary["exported"] = str(folder.final)
    if accelerator.is_main_process:
        write_atomic(folder.summary, json.dumps(summary, indent=1).encode())
    if tracker:
        tracker.finish(summary, None if signalled else folder.final)
    accelerator.end_training()
    return summary


def memory_bytes(recipe: Recipe, model: Any, optimizer: Any, evaluation: Any) -> dict[str, int]:
    """What the trained memory takes, in bytes by part. Replay: the data's files, where it has some;
    store: the largest of the last evaluation.
    """
    from mnemic.models.adapter_budget import byte_budget
    from mnemic.train.data.sources import find_files

    path = getattr(recipe.data, "path", None)
    replay = sum(file.stat().st_size for file in find_files(path, "data")) if path else 0
    return byte_budget(
        getattr(model, "expert_bank", model), optimizer, replay_bytes=replay,
        store_bytes=evaluation.store_bytes if evaluation else 0,
    )  # fmt: skip


def _load_best(trainer: Any, recipe: Recipe, evaluation: Any) -> None:
    """With `evaluation.export_best`, put the best checkpoint's weights into the model."""
    if (
        not (recipe.evaluation and recipe.evaluation.export_best)
        or evaluation.best_step == trainer.step
    ):
        return
    best = dict(list_checkpoints(trainer.checkpoints)).get(evaluation.best_step)
    if best is None:
        log.warning("evaluation.export_best: the untrained model was best; exporting the last step")
        return
    trainer.resume(best)
    log.info("exporting the best checkpoint, step %d", evaluation.best_step)


def prompt_form(recipe: Recipe) -> str:
    """How rows give their prompts, so that `mnemic generate` asks alike: `text` or `chat`."""
    from mnemic.train.data.formats import Conversation, FormatError, as_example
    from mnemic.train.data.stream import one_pass
    from mnemic.train.objectives.build import reader

    if recipe.objective.kind == "lm":
        return "text"
    if recipe.memory is not None:
        return recipe.memory.form
    rows = reader(recipe.data, holdout=None, held=False, key="data", quiet=True)
    for row in one_pass(rows, 100):
        with suppress(FormatError):  # a bad row, already reported
            return "chat" if isinstance(as_example(row.fields), Conversation) else "text"
    return "chat"


def count_steps(recipe: Recipe, tokenizer: Any) -> int:
    """`loop.steps`, or `loop.epochs` counted by one pass over the data as training will see it."""
    loop = recipe.loop
    if loop.steps is not None:
        return loop.steps
    from mnemic.train.data.stream import count_pass
    from mnemic.train.objectives.build import train_stream

    assert loop.epochs is not None
    log.info("counting the rows of one pass")
    rows = count_pass(train_stream(recipe, tokenizer, quiet=True).stream)
    return max(1, math.ceil(rows * loop.epochs / loop.batch_size))


def make_schedule(loop: Loop, total: int) -> Any:
    from mnemic.optim.schedules import lr_factor

    part = loop.schedule
    return partial(
        lr_factor, total=total, kind=part.kind, warmup=part.warmup, decay=part.decay,
        min_ratio=part.min_ratio,
    )  # fmt: skip
