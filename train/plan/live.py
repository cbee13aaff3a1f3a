"""Live bytes of a step, counted while the model runs on tensors that have shapes and no content.

torch's fake tensors run an 8B model at 64K tokens in seconds on any machine, through the same
kernels' bookkeeping: what autograd saves, what checkpointing recomputes, what casts and logits
take. Each storage is counted from the operation that makes it to its end; the sum agrees with the
resident bytes of a real step to a few percent where the heap gives back what is freed.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock
from weakref import ref

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import set_checkpoint_early_stop

from mnemic.train.plan.shapes import Shape

SMALL = 32 << 20
"""glibc never takes larger blocks from the heap (DEFAULT_MMAP_THRESHOLD_MAX)."""
_MOVES = 1 << 20  # smallest saved storage that offload.activations moves, as offload/saved.py


@dataclass(frozen=True)
class Peak:
    """Bytes at the moment of the most: `gradients`, and all `others` than weights and optimizer
    state. `small`, `large`: the most at any moment of what the heap serves, and of the rest.
    """

    gradients: int = 0
    others: int = 0
    small: int = 0
    large: int = 0

    @property
    def total(self) -> int:
        return self.gradients + self.others


@dataclass(frozen=True)
class Counted:
    """A step in two books: each gradient gone when it is there (`freed`), or all kept (`held`).
    `moved`: by `offload.activations`.
    """

    freed: Peak
    held: Peak
    moved: int = 0


class _Book:
    """Keeps the most of what it is shown."""

    def __init__(self) -> None:
        self.gradients = self.total = self.small = self.large = self.others = 0

    def note(self, gradients: int, total: int, small: int) -> None:
        self.small, self.large = max(self.small, small), max(self.large, total - small)
        self.others = max(self.others, total - gradients)
        if total > self.total:
            self.gradients, self.total = gradients, total

    @property
    def peak(self) -> Peak:
        return Peak(self.gradients, self.total - self.gradients, self.small, self.large)


class Live(TorchDispatchMode):
    """Counts storages that come and go; those of `own` (weights, buffers) do not count.

    Two books are kept: `freed`, where a gradient is gone once `use` was called with its parameter,
    and `held`, where it stays.
    """

    def __init__(self, own: Iterable[Tensor]) -> None:
        super().__init__()
        self._own = {tensor.untyped_storage()._cdata for tensor in own}
        self._seen: dict[int, Any] = {}
        self._grads: dict[int, int] = {}
        self.live = self.small = self.gradients = self.used = self.used_small = 0
        self.freed, self.held = _Book(), _Book()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return out

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or key in self._own or not size:
            return

        def gone(_: Any) -> None:
            del self._seen[key]
            self.live -= size
            self.small -= size if size < SMALL else 0
            self.gradients -= self._grads.pop(key, 0)

        self._seen[key] = ref(storage, gone)
        self.live += size
        self.small += size if size < SMALL else 0
        self.note()

    def restart(self) -> None:
        """Begin anew to look for the highest."""
        self.freed, self.held = _Book(), _Book()
        self.note()

    def note(self) -> None:
        self.freed.note(self.gradients, self.live, self.small)
        self.held.note(
            self.gradients + self.used, self.live + self.used, self.small + self.used_small
        )

    def is_gradient(self, grad: Tensor) -> None:
        storage = grad.untyped_storage()
        if storage._cdata in self._seen and storage._cdata not in self._grads:
            self._grads[storage._cdata] = storage.nbytes()
            self.gradients += storage.nbytes()

    def use(self, param: Tensor) -> None:
        """The gradient of `param` is used and freed, in one of the books."""
        if param.grad is not None:
            size = param.grad.untyped_storage().nbytes()
            param.grad = None
            self.used += size
            self.used_small += size if size < SMALL else 0


@dataclass
class Fake:
    """A model whose parameters and buffers are fake: run it inside `mode()`."""

    model: Any
    device: torch.device
    precision: str
    fakes: FakeTensorMode

    @property
    def own(self) -> list[Tensor]:
        return [*self.model.parameters(), *self.model.buffers()]

    @contextmanager
    def mode(self) -> Iterator[Live]:
        """Fake tensors, counted. Batches are taken as they are announced: whether rows are packed
        is found out by looking, which is not possible here.
        """
        import transformers.masking_utils as masks

        look, packed = masks.find_packed_sequence_indices, self.packed
        found = mock.patch.object(
            masks, "find_packed_sequence_indices", look if packed else lambda *_, **__: None
        )
        live = Live(self.own)
        with found, self.fakes, live, set_checkpoint_early_stop(False):
            yield live

    packed = False

    def autocast(self, *, cache: bool = True) -> Any:
        if self.precision != "bf16":
            return nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16, cache_enabled=cache)


def fake(model: Any, device: torch.device, precision: str) -> Fake:
    """Give every parameter and buffer of `model` a fake in its place, tied ones the same."""
    fakes = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, Any] = {}
    with fakes:
        for module in model.modules():
            for name, param in module._parameters.items():
                if param is not None:
                    if id(param) not in made:
                        empty = torch.empty(param.shape, dtype=param.dtype, device=device)
                        made[id(param)] = nn.Parameter(empty, param.requires_grad), param
                    module._parameters[name] = made[id(param)][0]
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.empty(
                        buffer.shape, dtype=buffer.dtype, device=device
                    )
    return Fake(model, device, precision, fakes)


def training(
    fake: Fake, shapes: Sequence[Shape], *, moved: bool = False,
    around: Callable[[Shape], AbstractContextManager[Any]] = lambda _: nullcontext(),
) -> Counted:  # fmt: skip
    """Forward and backward of a step's micro-batches, the largest of them last: of several, two
    show what more would. `moved`: with saved tensors elsewhere. `around` a micro-batch.
    """
    from mnemic.train.objectives.tokens import token_loss

    model, last = fake.model, False
    fake.packed = shapes[-1].packed
    model.train()
    trained = [param for param in model.parameters() if param.requires_grad]
    saved = _Saved(fake.own)
    with fake.mode() as live:

        def ready(param: Tensor) -> None:
            assert param.grad is not None
            live.is_gradient(param.grad)
            if last:
                live.use(param)

        hooks = [param.register_post_accumulate_grad_hook(ready) for param in trained]
        for position, shape in enumerate(shapes[-2:]):
            last = position == len(shapes[-2:]) - 1
            batch = shape.batch(fake.device)
            with around(shape):
                with fake.autocast(), saved.hooks() if moved else nullcontext():
                    loss = token_loss(model, batch)
                (loss * 1.0).backward()
            del loss
        for hook in hooks:
            hook.remove()
    for param in trained:
        param.grad = None
    each = saved.moved // len(shapes[-2:])
    return Counted(live.freed.peak, live.held.peak, each)


@torch.no_grad()
def evaluating(fake: Fake, shape: Shape) -> Peak:
    """A forward with loss and without gradients."""
    from mnemic.train.objectives.tokens import token_loss

    fake.packed = shape.packed
    fake.model.eval()
    with fake.mode() as live:
        batch = shape.batch(fake.device)
        with fake.autocast():
            loss = token_loss(fake.model, batch)
        del loss
    fake.model.train()
    return live.freed.peak


class _Saved:
    """Saved tensors that wait elsewhere, as in `offload/saved.py`; here they have no content."""

    def __init__(self, own: Iterable[Tensor]) -> None:
        self._own = {tensor.untyped_storage()._cdata for tensor in own}
        self._copies: dict[int, tuple[Any, _Copy]] = {}
        self.moved = 0

    def hooks(self) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        if storage.nbytes() < _MOVES or storage._cdata in self._own:
            return tensor
        known, copy = self._copies.get(storage._cdata, (None, None))
        if copy is None or known is None or known() is None:
            copy = _Copy(storage.nbytes())
            self._copies[storage._cdata] = ref(storage), copy
            self.moved += copy.nbytes
        return copy, tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset()

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        copy, dtype, shape, stride, offset = packed
        if copy.data is None:
            copy.data = torch.empty(copy.nbytes, dtype=torch.uint8)
        return copy.data.view(dtype).as_strided(shape, stride, offset)


class _Copy:
    def __init__(self, nbytes: int) -> None:
        self.nbytes, self.data = nbytes, None
