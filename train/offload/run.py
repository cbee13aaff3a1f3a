"""A streamed run's life: build, first weights or last commit, resume, export, close."""

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch

from mnemic.train.checkpoint import verify
from mnemic.train.export import replace_folder
from mnemic.train.offload.build import build_engine, describe, source
from mnemic.train.offload.io import Trace
from mnemic.train.offload.update import StreamedAdapterUpdate, StreamedUpdate
from mnemic.train.offload.work import WorkFolders
from mnemic.train.recipe.offload import NoOffload
from mnemic.train.recipe.recipe import Recipe
from mnemic.train.recipe.training import StreamedUpdate as StreamedPart
from mnemic.train.update import PlainUpdate, Update

log = logging.getLogger("mnemic")


class StreamedRun:
    """`model` and `optimizer` for the trainer, over the claimed folders of `work`."""

    def __init__(
        self, recipe: Recipe, tokenizer: Any, device: torch.device, work: WorkFolders
    ) -> None:
        offload = recipe.offload
        assert not isinstance(offload, NoOffload)
        self.recipe, self.tokenizer = recipe, tokenizer
        self.trace = Trace() if offload.trace else None
        self.plan, self.engine = build_engine(recipe, tokenizer, device, work, self.trace)
        self.model, self.optimizer = self.plan.model, self.plan.optimizer
        self.found: dict[str, Any] | None = None

    def load(self, start: Path | None) -> None:
        """The last commit, or the first weights; a checkpoint to begin from brings its own."""
        self.found = self.engine.open()
        if self.found is None and (start is None or not self.plan.full):
            began = time.perf_counter()
            self.engine.load(source(self.recipe, self.tokenizer, self.plan))
            size = sum(p.nbytes for p in self.plan.layout.weight_pieces)
            log.info(
                "wrote %s bytes of weights into %s in %.1f s", f"{size:,}",
                self.engine.folder or "host memory", time.perf_counter() - began,
            )  # fmt: skip
        log.info("in memory: %s", describe(self.plan.layout))

    def update(self, accelerator: Any) -> Update:
        part = self.recipe.update
        assert isinstance(part, StreamedPart)
        if self.plan.full:
            return StreamedUpdate(self.engine, part.clip, part.max_grad_norm)
        limit = part.max_grad_norm
        plain = PlainUpdate(accelerator, self.model, self.optimizer, limit)
        return StreamedAdapterUpdate(self.engine, plain)

    def resume(self, trainer: Any, start: Path | None) -> bool:
        """Take the trainer to the last commit or to `start`, whichever is later; a checkpoint that
        the recipe names goes first. Whether there was anything.
        """
        if not self.plan.full:
            if start:
                trainer.resume(start)
            return start is not None
        step = self.found["step"] if self.found else -1
        named = self.recipe.loop.resume not in ("auto", "never")
        if start is not None and (named or verify(start)["step"] > step):
            trainer.resume(start)
            self.engine.store.commit(trainer.step, trainer.state_dict())
            return True
        if self.found and self.found["state"]:
            trainer.load_state_dict(self.found["state"])
            trainer.resumed_from = trainer.step
            return True
        return False

    def export(self, target: Path) -> None:
        """The trained model as a plain Hugging Face or PEFT folder, a tile at a time."""
        with replace_folder(target) as temp:
            if self.plan.full:
                export_engine(self.engine, self.model, temp)
            else:
                self.model.save_pretrained(temp)
            self.tokenizer.save_pretrained(temp)

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
