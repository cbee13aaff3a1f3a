"""The streamed update as the trainer sees it: steps, clipping, commits.

Clipping: the norm of all gradients is known only when the last of them is there, and the first have
been used by then. `layer` and `previous_norm` do without it. `speculative` steps as if it were
small, and where it was not, takes the step back (nothing of it was committed) and does it again
with the factor now known (after SuperOffload). `exact_spill` writes the gradients to disk, and
steps in a pass over them. Both give the step of the plain trainer.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mnemic.optim.tiled import TiledStep
from mnemic.optim.write import norm_fp32
from mnemic.train.data.collate import Batch
from mnemic.train.errors import UserError
from mnemic.train.offload.apply import total_norm
from mnemic.train.offload.engine import Engine
from mnemic.train.offload.vocabulary import Matrix
from mnemic.train.update import PlainUpdate, Update

log = logging.getLogger("mnemic")

_REMEDY = "lower optimizer.lr, lengthen loop.schedule.warmup, or set model.dtype=fp32"


class StreamedAdapterUpdate(Update):
    """Trains adapters, which are in memory, over a frozen base that is streamed and never written.

    All gradients are there at the end of a step, so clipping by their norm is exact as it is.
    """

    def __init__(self, engine: Engine, inner: PlainUpdate) -> None:
        self.engine, self.inner = engine, inner

    def run(
        self, trainer: Any, batches: Sequence[Batch], scale: float
    ) -> tuple[Tensor, dict[str, float]]:
        moved = [batch.to(self.engine.device) for batch in batches]
        loss, counts, _, _ = self.engine.streamer.run(moved, trainer.objective, scale)
        return loss, counts

    def finish(self, step: int) -> float:
        return self.inner.finish(step)

    def backward(self, loss: Tensor) -> None:
        raise AssertionError("a streamed update runs whole steps")

    def batch(self, last: bool) -> Any:
        raise AssertionError("a streamed update runs whole steps")


class StreamedUpdate(Update):
    """Steps the trained weights of `engine`, all of which are streamed.

    On SSD every step is committed; host memory is saved by checkpoints alone.
    """

    owns_weights = True

    def __init__(
        self, engine: Engine, clip: str = "none", max_grad_norm: float | None = None
    ) -> None:
        assert engine.applier is not None
        self.engine, self.applier = engine, engine.applier
        self.clip, self.max_grad_norm = clip, max_grad_norm
        self._previous_norm: float | None = None
        self._norms: dict[str, float] = {}
        self._tile_norms: dict[str, list[float]] = {}
        self._factors: dict[str, float] = {}
        self._factor = 1.0
        self._step = 0
        self.redone = 0
        self.commits = engine.commits
        engine.streamer.on_gradient = self._gradient

    # Norms and factors -----------------------------------------------------------------------

    def _note(self, name: str, grad: Tensor) -> float:
        norm = float(norm_fp32(grad))
        if not math.isfinite(norm):
            raise UserError(
                f"step {self._step}: the gradient of {name} is not finite; the step was not "
                f"committed, so the weights are those of step {self._step - 1}; {_REMEDY}"
            )
        return norm

    def _measure(self, name: str, grad: Tensor) -> Tensor:
        """For tiles, one after the other; "" for one that was noted before."""
        if name:
            self._tile_norms.setdefault(name, []).append(self._note(name, grad))
            self._tile = name
        factor = self._factors.get(self._tile, self._factor)
        return grad if factor == 1.0 else grad * factor

    _tile = ""

    def _clip_factor(self, norm: float) -> float:
        assert self.max_grad_norm is not None
        # As torch.nn.utils.clip_grad_norm_.
        return min(1.0, self.max_grad_norm / (norm + 1e-6))

    def _gradient(self, param: nn.Parameter) -> None:
        """Inside the backward: this layer parameter's gradient is complete."""
        self._use(self.engine.names[id(param)], param)

    def _use(self, name: str, param: nn.Parameter) -> None:
        grad = param.grad
        assert grad is not None
        norm = self._note(name, grad)
        self._norms[name] = norm
        if self.clip == "exact_spill":
            self.engine.spill.put(name, grad)
            param.grad = None
            return
        factor = self._clip_factor(norm) if self.clip == "layer" else self._factor
        if factor != 1.0:
            grad.mul_(factor)
        self.applier.whole(param)

    # A step ----------------------------------------------------------------------------------

    def run(
        self, trainer: Any, batches: Sequence[Batch], scale: float
    ) -> tuple[Tensor, dict[str, float]]:
        self._step = trainer.step + 1
        moved = [batch.to(self.engine.device) for batch in batches]
        self._factor = 1.0
        if self.clip == "previous_norm" and self._previous_norm:
            self._factor = self._clip_factor(self._previous_norm)
        seed, start = torch.initial_seed(), time.perf_counter()
        found = self._attempt(trainer, moved, scale)
        if self.clip == "speculative":
            factor = self._clip_factor(self._norm())
            if factor < 1.0:
                self.redone += 1
                norms, tile_norms = self._norms, self._tile_norms
                self.engine.rollback()
                self._factor = factor
                torch.manual_seed(seed)
                self._attempt(trainer, moved, scale)
                # The logged norm is the one before clipping.
                self._norms, self._tile_norms = norms, tile_norms
        if self.clip == "exact_spill":
            self._factor = self._clip_factor(self._norm())
            self._apply_spilled()
        if self.engine.trace:
            self.engine.trace.add("step", str(self._step), start)
        return found

    def _norm(self) -> float:
        return total_norm(
            [*self._norms.values(), *(x for t in self._tile_norms.values() for x in t)]
        )

    def _attempt(
        self, trainer: Any, batches: Sequence[Batch], scale: float
    ) -> tuple[Tensor, dict[str, float]]:
        self._norms, self._tile_norms, self._factors = {}, {}, {}
        engine, vocabulary = self.engine, self.engine.vocabulary
        step_tile: Callable[[int, Tensor, Tensor], None] | None = None
        begun: TiledStep | None = None
        head = vocabulary.head
        # A head of its own needs no further look at its gradient: it is stepped, or with APOLLO
        # measured, in the sweep that makes the hidden states' gradient.
        in_sweep = not vocabulary.tied and self.clip not in ("exact_spill", "layer")
        by_element = self.applier.rules[head.name].form is not None
        if in_sweep and by_element:
            self.applier.begin_block(head.name)
            number = self.applier.begin_tensor(head.name)
            step_tile = partial(vocabulary.step_tile, head, self.applier, self._measure, number)
        elif in_sweep:
            begun = vocabulary.tiled_step(head, self.applier)
            step_tile = partial(self._measure_tile, head, begun)
        loss, counts, inputs, fronts = engine.streamer.run(
            batches, trainer.objective, scale, head_step=step_tile, check=self._check_loss,
            before_layer=self._before_layer, after_layer=self._after_layer,
        )  # fmt: skip
        if in_sweep and by_element:
            self.applier.end_block(head.name)
        rows = [(front.ids, front.rows.grad) for front in fronts]
        for matrix in engine.matrices:
            if matrix is head and in_sweep:
                if begun is not None:
                    self._vocabulary_step(matrix, inputs, rows, begun)
            else:
                self._vocabulary_step(matrix, inputs, rows)
        self._before_layer("rest")
        for name, param in engine.rest.items():
            if param.grad is not None:
                self._use(name, param)
        self._after_layer("rest")
        return loss, counts

    def _measure_tile(
        self, matrix: Matrix, step: TiledStep, tile: int, weight: Tensor, grad: Tensor
    ) -> None:
        del weight
        step.measure(
            matrix.tiling.slice(tile), self._measure(matrix.name, grad.to(matrix.param.dtype))
        )

    def _check_loss(self, loss: Tensor) -> None:
        if not math.isfinite(float(loss)):
            raise UserError(
                f"step {self._step}: the loss is {float(loss)}, so the weights were left as they "
                f"were; {_REMEDY}"
            )

    def _before_layer(self, block: str) -> None:
        if self.clip == "exact_spill":
            self.engine.spill.begin(block)
        else:
            self.applier.begin_block(block)

    def _after_layer(self, block: str) -> None:
        if self.clip == "exact_spill":
            self.engine.spill.end(block)
        else:
            self.engine.write_block(block)
            self.applier.end_block(block)

    def _vocabulary_step(
        self, matrix: Matrix, inputs: Any, rows: Any, begun: TiledStep | None = None
    ) -> None:
        vocabulary = self.engine.vocabulary

        def tiles(skip: bool) -> Iterator[Any]:
            return vocabulary.gradient_tiles(matrix, inputs, rows, skip=skip)

        if self.clip == "exact_spill":
            for tile, _, grad in tiles(False):
                self._measure(matrix.name, grad)
                self.engine.spill.put_tile(matrix, tile, grad.to(matrix.param.dtype))
            return
        if self.clip == "layer":
            for _, _, grad in tiles(True):
                self._measure(matrix.name, grad)
            norm = total_norm(self._tile_norms.pop(matrix.name, []))
            self._factors[matrix.name] = self._clip_factor(norm)
        self._tile = matrix.name
        self.applier.begin_block(matrix.name)
        vocabulary.update(matrix, self.applier, tiles, self._measure, begun)
        self.applier.end_block(matrix.name)

    def _apply_spilled(self) -> None:
        """Step everything by the gradients on disk, times the clip factor."""
        engine, spill = self.engine, self.engine.spill
        vocabulary = engine.vocabulary

        def use(block: str, params: dict[str, nn.Parameter]) -> None:
            self.applier.begin_block(block)
            for name, grad in spill.gradients(block):
                params[name].grad = grad.mul_(self._factor) if self._factor != 1.0 else grad
                self.applier.whole(params[name])
            engine.write_block(block)
            self.applier.end_block(block)

        for matrix in engine.matrices:
            self.applier.begin_block(matrix.name)
            vocabulary.update(
                matrix,
                self.applier,
                lambda skip, m=matrix: spill.tiles(m, vocabulary),
                self._clipped,
            )
            self.applier.end_block(matrix.name)
        streamer = engine.streamer
        for index in range(streamer.num_layers):
            with streamer.layer(index, [index + 1]):
                engine.layers.settle(f"block/{index}")
                use(f"block/{index}", streamer.named(index))
        use("rest", engine.rest)

    def _clipped(self, name: str, grad: Tensor) -> Tensor:
        del name
        return grad if self._factor == 1.0 else grad * self._factor

    def finish(self, step: int) -> float:
        self.applier.steps.finish()
        norm = self._norm()
        self._previous_norm = norm
        self._norms, self._tile_norms = {}, {}
        return norm

    def commit(self, trainer: Any) -> None:
        """Make the step the one to resume from; with its row, callbacks and data cursor."""
        if not self.commits:
            self.engine.store.commit(trainer.step, {})
            return
        for callback in trainer.callbacks:
            callback.before_save(trainer, trainer.step)
        self.engine.store.commit(trainer.step, trainer.state_dict())
        for callback in trainer.callbacks:
            callback.on_save(trainer, trainer.step, self.engine.folder)

    @property
    def checkpoint_bytes(self) -> int:
        return sum(piece.padded for piece in self.engine.store.plan.pieces.values())

    def write(self, folder: Path) -> None:
        """Weights and states of the present step into a checkpoint folder."""
        self.engine.save(folder)

    def read(self, folder: Path) -> None:
        self.engine.restore(folder)

    # The trainer's older contract, which a vertical schedule cannot keep: `run` does it all.
    def backward(self, loss: Tensor) -> None:
        raise AssertionError("a streamed update runs whole steps")

    def batch(self, last: bool) -> Any:
        raise AssertionError("a streamed update runs whole steps")

    def state_dict(self) -> dict[str, Any]:
        return {"previous_norm": self._previous_norm}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._previous_norm = state.get("previous_norm")
