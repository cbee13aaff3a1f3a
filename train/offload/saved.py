"""What the backward of a model in memory needs, waiting on the host or in a file.

autograd saves tensors in the forward and hands them out in the backward; `saved_tensors_hooks` put
something else in their place meanwhile. Copies are exact and come back with their strides, so
training has the same bits. With gradient checkpointing autograd saves the inputs of layers and
nothing else, so only those move.

A storage is copied whole and once, however many views of it are saved (queries, keys and values of
one product; a cosine table that all layers use): memory would hold it whole and once as well. The
weights themselves never move; without checkpointing, their casts under autocast do, as autograd
saves them.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from mnemic.train.errors import UserError
from mnemic.train.offload.memory import settle_malloc
from mnemic.train.offload.scratch import AHEAD, HostCopies, Scratch, View, storage_bytes
from mnemic.train.recipe.offload import NoOffload
from mnemic.train.recipe.recipe import Recipe

log = logging.getLogger("mnemic")

MINIMUM = 1 << 20
"""Smallest storage that moves, bytes: below it a request costs more than the memory is worth."""


class _Storage:
    """A storage's copy; back in memory from its first use to the last."""

    __slots__ = ("__weakref__", "data", "number", "place", "ticket")

    def __init__(self, place: HostCopies | Scratch, ticket: Any, number: int) -> None:
        self.place, self.ticket, self.number = place, ticket, number
        self.data: Tensor | None = None

    def __del__(self) -> None:
        if self.data is None:
            self.place.drop(self.ticket)


class _Packed:
    """What autograd holds in place of a tensor, and lets go of when the backward has used it."""

    __slots__ = ("storage", "view")

    def __init__(self, storage: _Storage, view: View) -> None:
        self.storage, self.view = storage, view


class _Left:
    """A tensor that stays where it is. With hooks autograd does not look whether it was changed in
    place before its use (a copy does not mind), so this does.
    """

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.version = tensor, tensor._version

    def checked(self) -> Tensor:
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.tensor.shape)} that the backward needs has been "
                "modified by an inplace operation since the forward"
            )
        return self.tensor


class SavedTensors:
    """`with saved():` around a batch's forward and loss; its backward comes after.

    Tensors on devices like `device` go to `place` if their storage has at least `minimum` bytes and
    is not that of a parameter or buffer of `model`. The last ones written are needed first: the two
    before the one that is used are being read meanwhile.
    """

    def __init__(
        self, place: HostCopies | Scratch, model: nn.Module, device: torch.device, minimum: int
    ) -> None:
        self.place, self.model, self.device, self.minimum = place, model, device, minimum
        self.spilled_bytes = 0
        """What has been set aside, in total."""
        self.forwards = 0
        self._own: set[int] = set()
        self._copies: dict[int, tuple[StorageWeakRef, int, _Storage]] = {}
        self._order: list[ref[_Storage]] = []

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self._own = {
            part.untyped_storage()._cdata
            for tensor in (*self.model.parameters(), *self.model.buffers())
            for part in _plain_parts(tensor)
        }
        self._order = []
        self.forwards += 1
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
                yield
        finally:
            self._copies.clear()

    def _pack(self, tensor: Tensor) -> _Packed | _Left:
        if not _is_plain(tensor) or tensor.device.type != self.device.type:
            return _Left(tensor)
        storage = tensor.untyped_storage()
        if storage.nbytes() < self.minimum or storage._cdata in self._own:
            return _Left(tensor)
        found = self._copies.get(storage._cdata)
        # Another storage cannot have this number while the weak reference is there.
        if found is None or found[1] != tensor._version:
            kept = _Storage(self.place, self.place.put(storage_bytes(tensor)), len(self._order))
            self._order.append(ref(kept))
            self.spilled_bytes += storage.nbytes()
            found = StorageWeakRef(storage), tensor._version, kept
            self._copies[storage._cdata] = found
        return _Packed(found[2], View.of(tensor))

    def _unpack(self, packed: _Packed | _Left) -> Tensor:
        if isinstance(packed, _Left):
            return packed.checked()
        kept = packed.storage
        if kept.data is None:
            self.place.begin(kept.ticket)
            for other in self._before(kept.number):
                self.place.begin(other.ticket)
            kept.data = self.place.get(kept.ticket, packed.view.device)
            kept.ticket = None
        return packed.view.over(kept.data)

    def _before(self, number: int) -> Iterator[_Storage]:
        """The storages that will be asked for next."""
        wanted = AHEAD
        for index in range(min(number, len(self._order)) - 1, -1, -1):
            other = self._order[index]()
            if other is not None and other.data is None:
                yield other
                wanted -= 1
                if not wanted:
                    return


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's bytes are its storage: no subclass, not sparse, no conjugate view."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    )


def _plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors with memory that a parameter consists of (an int8 weight: codes, scales...)."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
        yield from _plain_parts(getattr(tensor, name))


def saved_activations(
    recipe: Recipe, model: nn.Module, accelerator: Any, folder: Path, stack: ExitStack
) -> Callable[[], AbstractContextManager[None]]:
    """The context of each forward that `offload.activations` asks for, closed by `stack`.

    `folder`: the run's, where the file lies unless `offload.path` is given.
    """
    offload, device = recipe.offload, accelerator.device
    if not isinstance(offload, NoOffload) or offload.activations == "device":
        return nullcontext
    engine = str(accelerator.distributed_type).rsplit(".", 1)[-1]
    if engine in ("FSDP", "DEEPSPEED"):
        raise UserError(
            f"offload.activations={offload.activations} would move the weights that {engine} "
            "gathers along with the activations; set it to device, or launch with DDP"
        )
    if offload.activations == "ssd":
        path = Path(offload.path).expanduser() if offload.path else folder
        if not path.is_dir():
            raise UserError(
                f"offload.path: {path} is not a folder; give an existing one on a fast disk"
            )
        settle_malloc()
        place: HostCopies | Scratch = Scratch(path, device)
    elif device.type == "cpu":
        log.warning(
            "offload.activations=host has no effect on the CPU, whose memory is the host's; set "
            "it to ssd, or leave it out"
        )
        return nullcontext
    else:
        place = HostCopies(device)
    stack.callback(place.close)
    saved = SavedTensors(place, model, device, MINIMUM)
    stack.callback(_tell, saved, offload.activations)
    return saved


def _tell(saved: SavedTensors, where: str) -> None:
    """At the end of a run: a setting that did nothing says so."""
    if saved.forwards and not saved.spilled_bytes:
        log.warning(
            "offload.activations=%s had no effect: no tensor that the backward needs has %s bytes, "
            "below which it stays in memory; leave it out, or train longer rows or more at once",
            where, f"{saved.minimum:,}",
        )  # fmt: skip
