"""When gradients become weights.

`PlainUpdate`: the whole backward first, then one optimizer step. `DeepSpeedUpdate`: the same by its
engine. `InBackwardUpdate` (in_backward.py): inside the backward, tensor by tensor.
`StreamedUpdate` (offload/update.py): the same, layer by layer, over weights that are not in memory.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mnemic.train.data.collate import Batch
from mnemic.train.errors import UserError


class Update(ABC):
    """Contract between the trainer and the ways from loss to weights. A streamed update
    (offload/update.py) takes all batches of a step at once; the others go through `run` here.
    """

    owns_weights = False
    """Whether weights and optimizer state live with the update, so that it saves them itself."""
    commits = False
    """Whether every step is made the state to resume from, so that the last needs no checkpoint."""
    saving: Callable[[], AbstractContextManager[Any]] = nullcontext
    """Context of each forward in `run`: where what the backward needs waits for it."""

    @property
    def checkpoint_bytes(self) -> int:
        """What `write` puts into a checkpoint folder."""
        return 0

    def write(self, folder: Path) -> None:
        """Save weights and optimizer state, where `owns_weights`."""
        raise AssertionError("the trainer saves this update's weights")

    def read(self, folder: Path) -> None:
        """Load them."""
        raise AssertionError("the trainer saves this update's weights")

    def run(
        self, trainer: Any, batches: Sequence[Batch], scale: float
    ) -> tuple[Tensor, dict[str, float]]:
        """Forward and backward of a step's batches, each loss multiplied with `scale`; the sum of
        losses before that, and of the counts.
        """
        device = trainer.accelerator.device
        loss_sum = torch.zeros((), device=device)
        sums: dict[str, float] = {}
        for index, batch in enumerate(batches):
            trainer.latest = batch
            with self.batch(last=index == len(batches) - 1):
                with trainer.autocast(), self.saving():
                    loss, counts = trainer.objective.loss(trainer.model, batch.to(device))
                self.backward(loss * scale)
            loss_sum += loss.detach()
            for key, value in {**batch.counts, **counts}.items():
                sums[key] = sums.get(key, 0.0) + value
        return loss_sum, sums

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Gradients of one batch's loss."""

    @abstractmethod
    def batch(self, last: bool) -> Any:
        """Context of one batch's forward and backward; `last` of the step."""

    @abstractmethod
    def finish(self, step: int) -> float | None:
        """End a step: weights have changed when it returns. The gradient norm before clipping."""

    def commit(self, trainer: Any) -> None:
        """After each step and its row: make it the state to resume from, where that costs nothing
        extra.
        """
        del trainer

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state


class PlainUpdate(Update):
    """Accumulates gradients over a step's batches, clips by global norm, steps the optimizer.

    Accumulation is a sum: the trainer has divided each batch's loss by the weight of the whole
    step. Under DDP the ranks are synchronised on the last batch only.
    """

    def __init__(
        self, accelerator: Any, model: Any, optimizer: Any, max_grad_norm: float | None
    ) -> None:
        self.accelerator, self.model, self.optimizer = accelerator, model, optimizer
        self.max_grad_norm = max_grad_norm
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def batch(self, last: bool) -> Any:
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def finish(self, step: int) -> float:
        """Clip, check, step, zero. Returns the global gradient norm before clipping.

        A norm that is not finite raises `UserError` and leaves the weights as they were.
        """
        norm = float(self._norm())
        if not math.isfinite(norm):
            self.optimizer.zero_grad(set_to_none=True)
            raise UserError(
                f"step {step}: the gradient norm is {norm}, so the weights were left as they were; "
                "lower optimizer.lr, lengthen loop.schedule.warmup, or set model.dtype=fp32"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _norm(self) -> Tensor:
        grads = [p.grad for p in self.parameters if p.grad is not None]
        if any(g.dtype in (torch.bfloat16, torch.float16) for g in grads) and not any(
            hasattr(g, "to_local") for g in grads
        ):
            # torch's own norm has the gradients' dtype, and bf16 has three digits.
            norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in grads]
            norm = torch.linalg.vector_norm(torch.stack(norms))
            if self.max_grad_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(self.parameters, self.max_grad_norm, norm)
            return norm
        if self.max_grad_norm is not None:
            norm = self.accelerator.clip_grad_norm_(self.parameters, self.max_grad_norm)
        else:
            norm = torch.nn.utils.get_total_norm(grads)
        # DTensor norms (FSDP2) are partial until asked for.
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # type: ignore[attr-defined]


class DeepSpeedUpdate(Update):
    """The same under DeepSpeed, whose engine accumulates, clips and steps by its own counters.

    `num_batches` is the engine's gradient_accumulation_steps: it divides each loss by that number
    and steps at the last batch, inside `backward`.
    """

    def __init__(self, accelerator: Any, model: Any, optimizer: Any, num_batches: int) -> None:
        self.accelerator, self.engine, self.optimizer = accelerator, model, optimizer
        self.num_batches = num_batches

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss * self.num_batches)

    def batch(self, last: bool) -> Any:
        del last  # the engine counts
        return nullcontext()

    def finish(self, step: int) -> float | None:
        del step  # the engine skips non-finite steps and says so itself
        norm = self.engine.get_global_grad_norm()
        return None if norm is None else float(norm)
