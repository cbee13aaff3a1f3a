"""A function of rows, run a few rows at a time and run again in the backward: nothing but its input
is kept, and what it holds meanwhile is one chunk's.

torch's checkpoint of each chunk would do the same, but it adds up the weights' gradients in their
own type, and a bf16 sum of many small terms loses them (axolotl #1601, #3666): here the sum is
fp32. Gradients come out of one node, so hooks on them run once (axolotl #3116).
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Replay:
    """The random numbers and the autocast of a forward, to run it again in the backward."""

    def __init__(self, device: torch.device) -> None:
        kind = device.type
        self.device = device
        self.cpu = torch.get_rng_state()
        self.own = torch.get_device_module(device).get_rng_state(device) if kind != "cpu" else None
        self.autocast: dict[str, Any] = {
            "device_type": kind,
            "enabled": torch.is_autocast_enabled(kind),
            "dtype": torch.get_autocast_dtype(kind),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }

    @contextmanager
    def __call__(self) -> Any:
        devices = [] if self.own is None else [self.device]
        with torch.random.fork_rng(devices, device_type=self.device.type if devices else "cuda"):
            torch.set_rng_state(self.cpu)
            if self.own is not None:
                torch.get_device_module(self.device).set_rng_state(self.own, self.device)
            with torch.autocast(**self.autocast):
                yield


class Sums:
    """Gradients of `params` added up over chunks: in fp32 where theirs would round them, and given
    out in their own type.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self.params = params
        self._sums: list[Tensor | None] = [None] * len(params)

    def add(self, grads: Sequence[Tensor | None]) -> None:
        for i, grad in enumerate(grads):
            if grad is None:
                continue
            known = self._sums[i]
            if known is None:
                self._sums[i] = grad.float() if grad.dtype.itemsize < 4 else grad.clone()
            else:
                known.add_(grad)

    def results(self) -> list[Tensor | None]:
        return [
            s if s is None else s.to(p.dtype) for s, p in zip(self._sums, self.params, strict=True)
        ]


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., Tensor], rows: int, extra: tuple[Tensor, ...],
        x: Tensor, *params: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.function, ctx.rows, ctx.replays = function, rows, []
        ctx.save_for_backward(x, *extra, *params)
        ctx.num_extra = len(extra)
        found = []
        for start in range(0, x.shape[0], rows):
            ctx.replays.append(Replay(x.device))
            found.append(function(*(t[start : start + rows] for t in (x, *extra))))
        return torch.cat(found)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,) = grads
        x, *others = ctx.saved_tensors
        extra, params = others[: ctx.num_extra], others[ctx.num_extra :]
        needs = [i for i, needed in enumerate(ctx.needs_input_grad[4:]) if needed]
        wanted = [params[i] for i in needs]
        dx = torch.empty_like(x) if ctx.needs_input_grad[3] else None
        sums = Sums(wanted)
        for number, start in enumerate(range(0, x.shape[0], ctx.rows)):
            part = slice(start, start + ctx.rows)
            with torch.enable_grad(), ctx.replays[number]():
                leaf = x[part].detach().requires_grad_(dx is not None)
                out = ctx.function(leaf, *(t[part] for t in extra))
            sources = [*([leaf] if dx is not None else []), *wanted]
            found = list(torch.autograd.grad(out, sources, grad[part], allow_unused=True))
            if dx is not None:
                own = found.pop(0)
                dx[part] = 0 if own is None else own
            sums.add(found)
        results: list[Tensor | None] = [None] * len(params)
        for i, value in zip(needs, sums.results(), strict=True):
            results[i] = value
        return None, None, None, dx, *results


def in_rows(
    function: Callable[..., Tensor], x: Tensor, *extra: Tensor, rows: int,
    params: Sequence[Tensor] = (),
) -> Tensor:  # fmt: skip
    """`function(x, *extra)` for a function that treats each row (first dimension) by itself, in
    chunks of `rows`. `params`: the tensors inside it that want gradients. `extra` gets none.
    """
    trained = [p for p in params if p.requires_grad]
    if not torch.is_grad_enabled() or not (x.requires_grad or trained):
        parts = range(0, x.shape[0], rows)
        return torch.cat([function(*(t[s : s + rows] for t in (x, *extra))) for s in parts])
    return _Rows.apply(function, rows, extra, x, *trained)  # type: ignore[no-any-return]
