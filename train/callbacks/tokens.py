"""What token sparsity did: kept share by layer, supervised tokens dropped, saved bytes; every some
steps a dense probe.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from mnemic.models.tokens.sparsity import TokenSparsity
from mnemic.train.callbacks.base import Callback, MetricsRow
from mnemic.train.objectives.tokens import base_of
from mnemic.train.tokens import dense_probe

if TYPE_CHECKING:
    from mnemic.train.trainer import Trainer

log = logging.getLogger("mnemic")


class SavedBytes:
    """Context of a forward that counts what autograd keeps for the backward: each storage once,
    without the weights. `most`: of the forwards since it was last asked for.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.most = model, 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        own = {
            tensor.untyped_storage()._cdata
            for tensor in (*self.model.parameters(), *self.model.buffers())
            if type(tensor) in (Tensor, nn.Parameter)
        }
        seen: dict[int, Any] = {}
        total = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            if type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                if storage._cdata not in own and storage._cdata not in seen:
                    # Another storage cannot have this number while the weak reference is there.
                    seen[storage._cdata] = StorageWeakRef(storage)
                    total += storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield
        self.most = max(self.most, total)

    def take(self) -> int:
        most, self.most = self.most, 0
        return most


class TokensCallback(Callback):
    """Tells the sparsity how far the run is; adds `tokens/...` and `perf/saved_bytes` to rows."""

    def __init__(self, sparsity: TokenSparsity, probe_every: int | None = None) -> None:
        self.sparsity, self.probe_every = sparsity, probe_every
        self._saved: SavedBytes | None = None
        self._least_kept: float | None = None

    def on_start(self, trainer: "Trainer") -> None:
        self.sparsity.progress = trainer.step / trainer.total_steps
        update = trainer.update
        streamed = getattr(base_of(trainer.module), "streamer", None) is not None
        # Saved tensors that are moved away are counted by who moves them; a streamed model's
        # backward saves nothing but layers' inputs.
        if _is_free(update.saving) and not streamed:
            self._saved = update.saving = SavedBytes(trainer.module)

    def on_step(self, trainer: "Trainer", row: MetricsRow) -> None:
        if row["step"]:
            report = self.sparsity.report()
            row.update(report)
            kept, least = report["tokens/kept"], self._least_kept
            self._least_kept = kept if least is None else min(least, kept)
            if self._saved:
                row["perf/saved_bytes"] = self._saved.take()
            if self.probe_every and row["step"] % self.probe_every == 0 and trainer.latest:
                row.update(dense_probe(trainer, self.sparsity, trainer.latest))
        self.sparsity.progress = row["step"] / trainer.total_steps

    def close(self, trainer: "Trainer", error: BaseException | None) -> None:
        config = self.sparsity.config
        if error is None and self._least_kept == 1 and config.mlp_backward_keep is None:
            log.warning(
                "tokens had no effect: every token was kept in every step; lower tokens.keep (%g) "
                "or tokens.block (%d tokens, chosen together), or train longer rows",
                config.keep, config.block,
            )  # fmt: skip


def _is_free(saving: Callable[[], AbstractContextManager[Any]]) -> bool:
    from contextlib import nullcontext

    return saving is nullcontext
