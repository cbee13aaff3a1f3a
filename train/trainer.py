"""The one loop. It counts steps, saves and resumes, calls callbacks; it knows no loss, no
optimizer, no tracker.

A step: the objective gives batches, their weights are summed over all ranks, each batch's loss (a
sum) is divided by that total, the update turns gradients into weights. Any split of a global batch
into micro-batches and ranks therefore gives the same gradient, to round-off.
"""

import logging
import math
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from mnemic.train.callbacks.base import Callback, MetricsRow
from mnemic.train.checkpoint import CheckpointWriter, list_checkpoints, prune, verify
from mnemic.train.errors import UserError
from mnemic.train.objectives.base import Objective
from mnemic.train.sharded import FOLDER, load_optimizer, load_weights, save_parts, tensors_of
from mnemic.train.state import (
    autocast_of,
    bytes_of,
    save_tensors,
    seed_step,
    trained_tensors,
)

log = logging.getLogger("mnemic")


class Trainer:
    """Runs `objective` on `model` for `total_steps` optimizer steps.

    `lr_at(step)` gives the factor of each group's peak rate. `model` and `optimizer` are what
    `accelerator.prepare` returned. `precision="bf16"` runs forward and loss under autocast.
    """

    def __init__(
        self,
        *,
        accelerator: Any,
        model: Any,
        optimizer: Any,
        objective: Objective,
        update: Any,
        lr_at: Callable[[int], float],
        total_steps: int,
        checkpoints: Path,
        callbacks: Sequence[Callback],
        seed: int = 0,
        precision: str = "fp32",
        save_every: int = 100,
        keep_checkpoints: int = 2,
    ) -> None:
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.objective, self.update, self.lr_at = objective, update, lr_at
        self.total_steps, self.checkpoints, self.callbacks = total_steps, checkpoints, callbacks
        self.seed, self.precision = seed, precision
        self.save_every, self.keep_checkpoints = save_every, keep_checkpoints
        self.step = 0
        self.tokens_seen = 0.0
        self.latest: Any = None  # the last micro-batch, for callbacks that look closer
        self.stop_reason: str | None = None
        self.save_requested = False
        self.protected_steps: set[int] = set()
        self.resumed_from: int | None = None
        self._saved_step: int | None = None
        self._signal: int | None = None
        self._peak_lr = [group["lr"] for group in optimizer.param_groups]

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def module(self) -> Any:
        """The model without accelerate's wrapper."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def engine(self) -> str | None:
        """What holds the model in shards: "fsdp2", "deepspeed", or None where copies are whole."""
        name = str(self.accelerator.distributed_type).rsplit(".", 1)[-1]
        return {"FSDP": "fsdp2", "DEEPSPEED": "deepspeed"}.get(name)

    @property
    def sharded(self) -> bool:
        return self.engine is not None

    @property
    def _apart(self) -> bool:
        """Whether the optimizer's state is saved with the weights, by whoever holds them."""
        return self.sharded or self.update.owns_weights

    def autocast(self) -> Any:
        """Context of every forward."""
        return autocast_of(self.accelerator.device, self.precision)

    def stop(self, reason: str) -> None:
        """End the run after the present step; the reason goes into the summary."""
        self.stop_reason = self.stop_reason or reason

    def fit(self) -> None:
        """Train from `self.step` to `total_steps`, or until stopped. Always closes the
        callbacks.
        """
        error: BaseException | None = None
        handlers = self._install_signals()
        try:
            for callback in self.callbacks:
                callback.on_start(self)
            if self.step == 0:
                row: MetricsRow = {"step": 0}
                self._finish_row(row)
            while self.step < self.total_steps and self.stop_reason is None:
                row = self._train_step()
                self._finish_row(row)
                last = self.step >= self.total_steps or self.stop_reason is not None
                last = last and not self.update.commits
                if last or self.save_requested or self.step % self.save_every == 0:
                    self.save()
                # After the checkpoint: a step that asked for one is not passed over without it.
                self.update.commit(self)
        except BaseException as caught:
            error = caught
            raise
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            for callback in self.callbacks:
                callback.close(self, error)

    def _train_step(self) -> MetricsRow:
        start = time.perf_counter()
        number = self.step + 1
        seed_step(self.seed, number, self.accelerator.process_index)
        batches = self.objective.microbatches(number)
        (total,) = self.sum_over_ranks([sum(b.weight for b in batches)])
        if total <= 0:
            raise UserError(
                f"step {number}: no token of the batch is trained, so the loss would be 0; "
                "check objective.loss_on and the rows"
            )
        factor = self.lr_at(self.step)
        for group, peak in zip(self.optimizer.param_groups, self._peak_lr, strict=True):
            group["lr"] = peak * factor
        self.model.train()
        # DDP and FSDP average gradients over ranks; the loss is a sum over ranks.
        scale = self.accelerator.num_processes / total
        try:
            loss_sum, sums = self.update.run(self, batches, scale)
            keys = sorted(sums)
            values = [float(loss_sum), float(self._signal is not None), *(sums[k] for k in keys)]
            loss_value, stopping, *totals = self.sum_over_ranks(values)
            loss_value /= total
            if not math.isfinite(loss_value):
                raise UserError(
                    f"step {number}: the loss is {loss_value}, so the weights were left as they "
                    "were; lower optimizer.lr, lengthen loop.schedule.warmup, or set "
                    "model.dtype=fp32"
                )
            norm = self.update.finish(number)
        except (RuntimeError, MemoryError) as error:
            sentence = self._out_of_memory(error, number, batches)
            if sentence is None:
                raise
            raise UserError(sentence) from error
        self.step = number
        counts = dict(zip(keys, totals, strict=True))
        tokens = counts.pop("tokens", 0.0)
        self.tokens_seen += tokens
        if stopping:
            self.stop(f"signal {signal.Signals(self._signal or signal.SIGTERM).name}")
        seconds = time.perf_counter() - start
        return {
            "step": number,
            "loss": loss_value,
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": norm,
            "tokens": tokens,
            "tokens_seen": self.tokens_seen,
            "trained_tokens": total,
            **counts,
            **self.objective.metrics(),
            "perf/step_seconds": seconds,
            "perf/tokens_per_second": tokens / seconds,
        }

    def _finish_row(self, row: MetricsRow) -> None:
        for callback in self.callbacks:
            callback.on_step(self, row)
        if self.is_main and len(row) > 1:
            for callback in self.callbacks:
                callback.on_row(self, row)

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        """Sum over ranks; float64, so that counts stay exact."""
        if self.accelerator.num_processes == 1:
            return values
        device = self.accelerator.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return self.accelerator.reduce(torch.tensor(values, dtype=dtype, device=device)).tolist()

    def save(self) -> Path:
        """Write a checkpoint of the present step and drop the ones no longer kept. All ranks call
        it.
        """
        self.save_requested = False
        final = self.checkpoints / f"step-{self.step:08d}"
        if self._saved_step == self.step:
            return final
        self.accelerator.wait_for_everyone()
        if self.is_main or self.sharded:
            self._save()
        self.accelerator.wait_for_everyone()
        self._saved_step = self.step
        if self.is_main:
            for callback in self.callbacks:
                callback.on_save(self, self.step, final)
            prune(self.checkpoints, self.keep_checkpoints, self.protected_steps)
        return final

    def _save(self) -> None:
        if self.is_main:
            for callback in self.callbacks:
                callback.before_save(self, self.step)
        state = self.state_dict()
        own = self.update.owns_weights
        tensors: dict[str, Any] = {}
        if self.engine == "fsdp2":
            tensors = tensors_of(self.module, self.optimizer)
        elif not self.sharded and not own:
            tensors = trained_tensors(self.module)
        writer = CheckpointWriter(
            self.checkpoints, self.step, engine=self.engine, ranks=self.accelerator.num_processes,
            needed_bytes=bytes_of(state) + bytes_of(tensors) + self.update.checkpoint_bytes,
        )  # fmt: skip
        if not self.sharded:
            with writer as temp:
                if own:
                    self.update.write(temp)
                else:
                    save_tensors(tensors, temp / "model.safetensors")
                torch.save(state, temp / "trainer.pt")
            return
        # Rank 0 makes the folder and commits it; each rank writes its part.
        with writer if self.is_main else nullcontext():
            self.accelerator.wait_for_everyone()
            if self.engine == "fsdp2":
                save_parts(self.module, self.optimizer, writer.temp / FOLDER)
            else:
                self.accelerator.save_state(str(writer.temp / "accelerate"))
            self.accelerator.wait_for_everyone()
            if self.is_main:
                torch.save(state, writer.temp / "trainer.pt")

    def resume(self, path: Path) -> None:
        """Put everything back to the checkpoint at `path`, after checking every file of it.

        From another run's folder come weights, optimizer and data cursor; what callbacks keep
        (metrics file, tracker id, best step) belongs to that run and stays there.
        """
        if self.is_main:
            verify(path)
        self.accelerator.wait_for_everyone()
        # Of a whole optimizer's state, ranks under FSDP2 read their rows only.
        state = torch.load(
            path / "trainer.pt", map_location="cpu", weights_only=True, mmap=self.sharded
        )
        if self.engine == "deepspeed":
            self.accelerator.load_state(str(path / "accelerate"))
        elif self.update.owns_weights:
            self.update.read(path)
        else:
            load_weights(self.module, path)
            if self.sharded or (path / FOLDER).is_dir():
                load_optimizer(self.module, self.optimizer, path, state["optimizer"])
                del state["optimizer"]
        if path.resolve().parent != self.checkpoints.resolve():
            state |= {"callbacks": {}, "protected_steps": []}
        else:
            self._saved_step = state["step"]
        self.load_state_dict(state)
        self.resumed_from = self.step

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights, as tensors and plain values (`weights_only=True`
        reads it).
        """
        return {
            "step": self.step,
            "tokens_seen": self.tokens_seen,
            "seed": self.seed,
            "protected_steps": sorted(self.protected_steps),
            "objective": self.objective.state_dict(),
            "update": self.update.state_dict(),
            "optimizer": {} if self._apart else self.optimizer.state_dict(),
            "callbacks": {c.name: c.state_dict() for c in self.callbacks if c.name},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.tokens_seen = state["step"], state["tokens_seen"]
        self.protected_steps = set(state["protected_steps"])
        self.objective.load_state_dict(state["objective"])
        self.update.load_state_dict(state.get("update", {}))
        if not self._apart and "optimizer" in state:
            self.optimizer.load_state_dict(state["optimizer"])
        for callback in self.callbacks:
            if callback.name in state["callbacks"]:
                callback.load_state_dict(state["callbacks"][callback.name])

    def _install_signals(self) -> dict[int, Any]:
        """SIGINT and SIGTERM end the run after the step; a second one ends it at once."""

        def handle(number: int, frame: Any) -> None:
            del frame
            if self._signal is not None:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            self._signal = number
            log.warning("%s: finishing the step, then saving", signal.Signals(number).name)

        try:
            return {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not in the main thread: whoever embeds the loop handles signals
            return {}

    def _out_of_memory(self, error: Exception, step: int, batches: Sequence[Any]) -> str | None:
        """What to change, if `error` says that memory ran out."""
        text = str(error)
        lacking = (
            isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in text
        )
        if not lacking:
            return None
        rows = max(
            (b.tensors["input_ids"].shape[0] for b in batches if "input_ids" in b.tensors),
            default=1,
        )
        width = max(
            (b.tensors["input_ids"].shape[1] for b in batches if "input_ids" in b.tensors),
            default=0,
        )
        saved = list_checkpoints(self.checkpoints)
        smaller = f"loop.micro_batch_size={max(1, rows // 2)} (same result), " if rows > 1 else ""
        return (
            f"step {step}: out of memory on {self.accelerator.device.type} with {rows} rows of "
            f"{width} tokens at once; set {smaller}loop.gradient_checkpointing=true (same result), "
            "for long rows loop.sequence_chunk=1024 (same result), adapters=lora, or shorter rows, "
            "and run again: "
            + (f"it goes on from step {saved[-1][0]}" if saved else "no checkpoint was written yet")
        )
