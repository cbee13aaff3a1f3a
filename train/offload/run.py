"""A streamed run's life: build, first weights or last commit, resume, export, close."""

import json
import logging
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mnemic.models.adapter_card import base_hash
from mnemic.train.checkpoint import checkpoint_step, verify
from mnemic.train.errors import UserError
from mnemic.train.export import write_bank
from mnemic.train.folder import RunFolder, replace_folder
from mnemic.train.offload.build import build_engine, describe, open_copy, source
from mnemic.train.offload.engine import Engine
from mnemic.train.offload.io import Trace
from mnemic.train.offload.memory import settle_malloc
from mnemic.train.offload.store import MANIFEST, read_manifest
from mnemic.train.offload.transfer import own_name
from mnemic.train.offload.update import StreamedAdapterUpdate, StreamedUpdate
from mnemic.train.offload.work import WorkFolders, work_folders
from mnemic.train.recipe.model import NoAdapters
from mnemic.train.recipe.offload import NoOffload
from mnemic.train.recipe.recipe import Recipe
from mnemic.train.recipe.training import StreamedUpdate as StreamedPart
from mnemic.train.state import load_trained
from mnemic.train.update import PlainUpdate, Update

log = logging.getLogger("mnemic")


class StreamedRun:
    """`model` and `optimizer` for the trainer, over the claimed folders of `work`."""

    def __init__(
        self, recipe: Recipe, tokenizer: Any, device: torch.device, work: WorkFolders | None
    ) -> None:
        offload = recipe.offload
        assert not isinstance(offload, NoOffload)
        self.recipe, self.tokenizer = recipe, tokenizer
        self.trace = Trace() if offload.trace else None
        self.plan, self.engine = build_engine(recipe, tokenizer, device, work, self.trace)
        self.model, self.optimizer = self.plan.model, self.plan.optimizer
        self.found: dict[str, Any] | None = None

    def load(self, start: Path | None, run: RunFolder | None = None) -> None:
        """The last commit, or the first weights; a checkpoint to begin from brings its own."""
        folder, full = self.engine.folder, self.plan.full
        if start is not None and full and self._named:
            if folder and run and start.resolve().parent != run.checkpoints.resolve():
                self._refuse_to_begin(folder, start)
            # The checkpoint takes the commit's place, whether that can be read or not.
            self.engine.store.spare()
            return
        self.found = self.engine.open()
        if self.found is not None:
            return
        if start is not None and full:
            if folder:
                log.warning("%s holds no commit: going on from %s", folder, start)
            return
        if folder and full and run and run.metrics.exists() and run.metrics.stat().st_size:
            # Every row was written after a commit.
            raise UserError(
                f"offload: {folder} holds no commit, but {run.metrics} has rows, and there is no "
                "checkpoint to go on from; bring the folder back (is its disk mounted? was the "
                f"run folder moved?), or delete {run.path} to begin again"
            )
        began = time.perf_counter()
        self.engine.load(source(self.recipe, self.tokenizer, self.plan))
        size = sum(p.nbytes for p in self.plan.layout.weight_pieces)
        log.info(
            "wrote %s bytes of weights into %s in %.1f s", f"{size:,}",
            self.engine.folder or "host memory", time.perf_counter() - began,
        )  # fmt: skip

    @property
    def _named(self) -> bool:
        return self.recipe.loop.resume not in ("auto", "never")

    def _refuse_to_begin(self, folder: Path, start: Path) -> None:
        """A run that has begun from another run's checkpoint goes on from its own commits."""
        found = read_manifest(folder)
        if found is not None:
            raise UserError(
                f"offload: {folder} holds a commit of step {found['step']}, so the run cannot "
                f"begin from {start}; set loop.resume=auto to go on, or choose another run_dir"
            )

    def update(self, accelerator: Any) -> Update:
        part = self.recipe.update
        assert isinstance(part, StreamedPart)
        log.info("in memory: %s", describe(self.plan.layout))
        if self.recipe.offload.kind == "host" and self.engine.device.type == "cpu":
            log.warning(
                "offload.kind=host takes no weight and no state off the CPU, whose memory is the "
                "host's: only gradients are saved; set it to ssd to take less"
            )
        if self.plan.full:
            return StreamedUpdate(self.engine, part.clip, part.max_grad_norm)
        limit = part.max_grad_norm
        plain = PlainUpdate(accelerator, self.model, self.optimizer, limit)
        return StreamedAdapterUpdate(self.engine, plain)

    def resume(self, trainer: Any, start: Path | None) -> str | None:
        """Take the trainer to the last commit or to `start`, whichever is later; a checkpoint that
        the recipe names goes first. What was taken, None if there was nothing.
        """
        if not self.plan.full:
            if start:
                trainer.resume(start)
            return str(start) if start else None
        step = self.found["step"] if self.found else -1
        if start is not None and (self._named or checkpoint_step(start) > step):
            trainer.resume(start)
            self.engine.store.commit(trainer.step, trainer.state_dict())
            return str(start)
        if self.found and self.found["state"]:
            trainer.load_state_dict(self.found["state"])
            trainer.resumed_from = trainer.step
            return "its last commit"
        return None

    def export(self, target: Path) -> None:
        """The trained model as a plain Hugging Face or PEFT folder, a tile at a time."""
        with replace_folder(target) as temp:
            bank = getattr(self.model, "expert_bank", None)
            if self.plan.full:
                export_engine(self.engine, self.model, temp)
            elif bank is not None:
                self.name_base()
                write_bank(bank, temp, self.recipe)
            else:
                self.model.save_pretrained(temp)
            self.tokenizer.save_pretrained(temp)

    def name_base(self) -> None:
        """Tell a bank which base its experts are over, from the weights that were streamed."""
        bank = getattr(self.model, "expert_bank", None)
        if bank is None:
            return
        read = source(self.recipe, self.tokenizer, self.plan)
        # A reader of files knows the parameters by the names they have under peft's wrappers.
        inner = self.model.get_base_model()
        names = {own_name(name): name for name, _ in inner.named_parameters()}
        bank.name_base(base_hash(self.model, bank.operations, lambda n: read(names[n], None)))

    def close(self, folder: Path) -> None:
        self.engine.close()
        if self.trace is not None:
            lanes = ("lane", "name", "start", "end", "bytes")
            rows = [dict(zip(lanes, row, strict=True)) for row in self.trace.rows]
            (folder / "timeline.json").write_text(json.dumps(rows))


def export_engine(engine: Any, model: Any, folder: Path) -> None:
    engine.export(folder)
    model.config.save_pretrained(folder)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(folder)


def load_streamed(
    recipe: Recipe, tokenizer: Any, run_dir: Path, source: Path | None, given: bool
) -> "Loaded":
    """The model of a streamed run: at its last commit, or (`given`, and where there is no commit)
    as the checkpoint `source` holds it; adapters from the checkpoint, their base from the commit.
    """
    device = torch.device("cpu")
    if torch.accelerator.is_available() and recipe.loop.device == "auto":
        kind = torch.accelerator.current_accelerator()
        device = kind if kind is not None else device
    settle_malloc()
    stack = ExitStack()
    full = isinstance(recipe.adapters, NoAdapters)
    ssd = recipe.offload.kind == "ssd"
    work = work_folders(recipe, run_dir) if ssd else None
    committed = work is not None and (work.paths[0] / MANIFEST).is_file()
    if source is not None and (given or not committed or not full):
        verify(source)
    if full and source is not None and (given or not committed):
        plan, engine = open_copy(recipe, tokenizer, device, source)
        stack.callback(engine.close)
        return Loaded(plan.model, engine, stack)
    if full and not committed:
        raise UserError(f"{run_dir}: has no commit and no checkpoint yet; train it first")
    if work is not None:
        work.claim()
        stack.callback(work.release)
    run = StreamedRun(recipe, tokenizer, device, work)
    stack.callback(run.engine.close)
    run.load(None)
    if not full:
        assert source is not None
        load_trained(run.model, source / "model.safetensors")
    return Loaded(run.model, run.engine, stack, run)


@dataclass
class Loaded:
    """A streamed model and what must stay open for it."""

    model: Any
    engine: Engine
    stack: ExitStack
    run: StreamedRun | None = None

    def name_base(self) -> None:
        if self.run is not None:
            self.run.name_base()
