"""Memory traffic of an optimizer step, counted and not timed: the same figure on every machine.

A pass is as many bytes as the weights have, read once or written once; so AdamW's fused kernel has
7 (weight, gradient, two moments read; weight, two moments written). Every operator that torch
dispatches counts what it is given and what it gives, whether or not a cache would serve it; what a
kernel does inside itself, and code under torch.compile, is not seen.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# These leave memory as it was, or write it without reading it first.
_BARE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_OVERWRITE = ("copy_", "zero_", "fill_", "_foreach_copy_", "_foreach_zero_")


def _span(x: Tensor) -> tuple[tuple[Any, ...], int]:
    """What tells `x` from other tensors of one call, and the bytes it holds, expanded or not."""
    size = x.element_size()
    for length, stride in zip(x.shape, x.stride(), strict=True):
        size *= length if stride else min(length, 1)
    return (x.data_ptr(), x.shape, x.stride(), x.dtype), size


def _total(value: Any) -> dict[tuple[Any, ...], int]:
    return dict(_span(x) for x in tree_leaves(value) if isinstance(x, Tensor))


class _Traffic(TorchDispatchMode):
    """Adds up bytes read and written by operators."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        schema, name = func._schema, func._overloadpacket.__name__
        given = {a.name: v for a, v in zip(schema.arguments, args, strict=False)} | kwargs
        aliases = {a.name: a.alias_info for a in schema.arguments if a.alias_info is not None}
        if name in _BARE or any(not alias.is_write for alias in aliases.values()):
            return result  # a view, or memory without content
        # Fused kernels may write gradients, and do so only where they unscale them.
        fused = name.startswith("_fused_") and given.get("grad_scale") is None
        written = {k for k in aliases if not (fused and k == "grads")}
        out = {a.name for a in schema.arguments if a.is_out}
        unread = out | (written if name in _OVERWRITE else set())
        if name.endswith("_like") or name.startswith("new_"):
            unread.add("self")  # asked for its shape only
        reads = _total([v for k, v in given.items() if k not in unread])
        # In-place operators return their target, which is written once.
        writes = _total([v for k, v in given.items() if k in written]) | _total(result)
        self.bytes += sum(reads.values()) + sum(writes.values())
        return result


def count_passes(step: Callable[[], Any], weights: Iterable[Tensor]) -> float:
    """Bytes that the operators of one `step()` read and write, over the bytes of `weights`.

    Take a steady step, not the first. A tensor that one operator is given twice counts once, an
    in-place target as read and written, views and uninitialised memory not at all, an expanded
    tensor with the bytes it holds.
    """
    size = sum(w.numel() * w.element_size() for w in weights)
    if size == 0:
        raise ValueError("passes are counted in sizes of the weights, and these have none")
    with torch.no_grad(), _Traffic() as traffic:
        step()
    return traffic.bytes / size
