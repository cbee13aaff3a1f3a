"""The optimizer inside the backward: each tensor is changed as soon as its gradient is ready, and
the gradient is freed (after LOMO, arXiv 2306.09782; torch calls it optimizer-in-backward).

One real optimizer does it, through its own `step`: for the call, its groups hold that one tensor.
So schedule, state_dict and any optimizer's arithmetic stay what they are, and without clipping the
weights equal the plain update's bit for bit. With several micro-batches the gradients add up until
the last one, so all of them are held, and only the last backward frees them.

Several processes: no DDP wrapper and none of its buckets. A gradient is averaged over the ranks
just before it is used, in one order that all ranks share, so that no rank waits for another's
tensor.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mnemic.train.errors import UserError
from mnemic.train.update import Update

log = logging.getLogger("mnemic")

# Lists in a group that run parallel to its parameters.
_PARALLEL = ("param_names", "names")


class SingleSteps:
    """An optimizer's own `step`, one parameter at a time: its groups hold that one for the call."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.place = {
            id(p): (number, position)
            for number, group in enumerate(optimizer.param_groups)
            for position, p in enumerate(group["params"])
        }
        self._group_changes: dict[int, dict[str, Any]] = {}

    def group(self, param: Tensor) -> dict[str, Any]:
        return self.optimizer.param_groups[self.place[id(param)][0]]

    def step(self, param: Tensor) -> None:
        """Step `param` by its gradient."""
        groups = self.optimizer.param_groups
        number, position = self.place[id(param)]
        group = groups[number]
        alone = {**group, "params": [param]}
        for key in _PARALLEL:
            if key in group:
                alone[key] = [group[key][position]]
        before = {k: v for k, v in alone.items() if k not in ("params", *_PARALLEL)}
        self.optimizer.param_groups = [alone]
        try:
            self.optimizer.step()
        finally:
            self.optimizer.param_groups = groups
        # Some optimizers count steps in the group: every tensor of a step must see the same count.
        changes = {k: alone[k] for k, v in before.items() if alone[k] is not v}
        self._group_changes.setdefault(number, {}).update(changes)

    def finish(self) -> None:
        """At the end of a step: what the optimizer changed in its groups becomes theirs."""
        for number, changes in self._group_changes.items():
            self.optimizer.param_groups[number].update(changes)
        self._group_changes = {}


class InBackwardUpdate(Update):
    """Steps `optimizer` from hooks on the gradients of `model`.

    `clip`: "none"; "layer" scales each tensor's gradient to a norm of at most `max_grad_norm`;
    "previous_norm" scales all by max_grad_norm / (the global norm of the step before), if that is
    below 1. The norm that `finish` returns is the true one, before clipping.
    """

    def __init__(
        self, accelerator: Any, model: Any, optimizer: Any,
        clip: str = "none", max_grad_norm: float | None = None,
    ) -> None:  # fmt: skip
        self.accelerator = accelerator
        # accelerate's wrapper would count and scale; the hooks need the optimizer itself.
        self.optimizer = getattr(optimizer, "optimizer", optimizer)
        self.clip, self.max_grad_norm = clip, max_grad_norm
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.names = [n for n, _ in named]
        self.parameters = [p for _, p in named]
        self._index = {id(p): i for i, p in enumerate(self.parameters)}
        self._steps = SingleSteps(self.optimizer)
        self._armed = False
        self._norms: dict[int, Tensor] = {}
        self._previous_norm: float | None = None
        # The backward reaches the last parameters first.
        self._order = list(range(len(self.parameters)))[::-1]
        self._waiting: set[int] = set()
        self._next = 0
        for param in self.parameters:
            param.register_post_accumulate_grad_hook(self._ready)

    @contextmanager
    def batch(self, last: bool) -> Iterator[None]:
        """Context of one batch's forward and backward; the weights change in the last one's."""
        self._armed = last
        try:
            yield
        finally:
            self._armed = False

    def backward(self, loss: Tensor) -> None:
        """Backward, and with the step's last batch the steps of all tensors.

        A loss that is not finite on any rank raises before a weight is touched.
        """
        finite = torch.isfinite(loss.detach()).float()
        if self._armed and self.accelerator.num_processes > 1:
            finite = self.accelerator.reduce(finite, "sum") / self.accelerator.num_processes
        if float(finite) < 1:
            raise UserError(
                "the loss is not finite, so the weights were left as they were; lower "
                "optimizer.lr, lengthen loop.schedule.warmup, or set model.dtype=fp32"
            )
        loss.backward()
        if self._armed and self.accelerator.num_processes > 1:
            # What has no gradient on this rank may have one on another: another expert of a bank,
            # or of a router. Now, because the trainer sums over the ranks before `finish`.
            self._waiting = set(self._order)
            self._flush()

    def finish(self, step: int) -> float:
        """Step what is left, and return the global gradient norm before clipping."""
        if self.accelerator.num_processes == 1:
            # What only earlier batches of the step reached: another expert, a router's leavings.
            for index in self._order:
                if self.parameters[index].grad is not None:
                    self._apply(index)
        norms = [self._norms[i] for i in sorted(self._norms)]
        norm = float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
        self._steps.finish()
        bad = [self.names[i] for i in sorted(self._norms) if not self._norms[i].isfinite()]
        self._norms = {}
        self._waiting, self._next = set(), 0
        if bad:
            raise UserError(
                f"step {step}: the gradient of {bad[0]} and {len(bad) - 1} more tensors is not "
                "finite; those were left as they were, others of this step are changed already; "
                "the last checkpoint is whole: lower optimizer.lr, lengthen loop.schedule.warmup, "
                "or set model.dtype=fp32"
            )
        self._previous_norm = norm
        return norm

    def _ready(self, param: Tensor) -> None:
        if not self._armed:
            return
        index = self._index[id(param)]
        if self.accelerator.num_processes == 1:
            self._apply(index)
            return
        self._waiting.add(index)
        self._flush()

    def _flush(self) -> None:
        """Average and apply what is ready, in the shared order."""
        while self._next < len(self._order) and self._order[self._next] in self._waiting:
            index = self._order[self._next]
            param = self.parameters[index]
            missing = param.grad is None
            held = torch.tensor(0.0 if missing else 1.0, device=param.device)
            torch.distributed.all_reduce(held)
            self._next += 1
            if float(held) == 0:
                continue
            if missing:
                param.grad = torch.zeros_like(param)
            assert param.grad is not None
            torch.distributed.all_reduce(param.grad)
            param.grad /= self.accelerator.num_processes
            self._apply(index)

    def _apply(self, index: int) -> None:
        """Clip, step and free one tensor."""
        param = self.parameters[index]
        assert param.grad is not None
        norm = torch.linalg.vector_norm(param.grad, dtype=torch.float32)
        self._norms[index] = norm
        # Looking at the norm costs nothing on a CPU and a wait for the queue on an accelerator.
        if norm.device.type == "cpu" and not math.isfinite(norm.item()):
            param.grad = None
            return
        if self.clip == "layer":
            assert self.max_grad_norm is not None
            param.grad.mul_((self.max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
        elif self.clip == "previous_norm" and self._previous_norm:
            assert self.max_grad_norm is not None
            param.grad.mul_(min(1.0, self.max_grad_norm / (self._previous_norm + 1e-6)))
        self._steps.step(param)
        param.grad = None

    def state_dict(self) -> dict[str, Any]:
        """The norm that the next step clips by."""
        return {"previous_norm": self._previous_norm}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._previous_norm = state.get("previous_norm")
