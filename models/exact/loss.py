"""Next-token losses without logits: (N, V) never exists, whatever the head.

`token_losses` gives the cross-entropy of each row, which every objective can be written with: the
head runs on some rows at a time and again in the backward. `loss_sum` gives their sum, by torch's
own `F.linear_cross_entropy` (2.13 and later) where the head is a plain linear layer: it makes the
gradients in the forward, so there is no second pass.

Normalisation is the caller's, over the trained tokens of a whole step: means of chunks would be
wrong where chunks hold different numbers of them, and NaN where one holds none.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnemic.models.exact.recompute import in_rows
from mnemic.models.tokens.kernels import cross_entropy_rows, uses_triton

IGNORE = -100
_LOGITS = 1 << 24
"""Elements of logits at once: 64 MiB in fp32."""
NATIVE = hasattr(F, "linear_cross_entropy")


@dataclass(frozen=True)
class Scaling:
    """What a model does to its head's output: times `factor`, then cap * tanh(x / cap)."""

    factor: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.factor != 1.0:
            logits = logits * self.factor
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


def scaling_of(config: Any) -> Scaling:
    """Cohere multiplies, Granite divides, Gemma 2 caps."""
    text = config.get_text_config()
    factor = 1.0
    if getattr(text, "logit_scale", None):
        factor = float(text.logit_scale)
    if getattr(text, "logits_scaling", None):
        factor = 1.0 / float(text.logits_scaling)
    cap = getattr(text, "final_logit_softcapping", None)
    return Scaling(factor, None if cap is None else float(cap))


def chunk_rows(vocabulary: int) -> int:
    """Rows whose logits are held at once: at least 64, or the products get slow."""
    return max(64, _LOGITS // vocabulary)


def token_losses(
    run: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, *,
    params: Sequence[Tensor], vocabulary: int, scaling: Scaling, rows: int | None = None,
) -> Tensor:  # fmt: skip
    """Cross-entropy of each row, fp32 (N,); 0 where the target is `IGNORE`.

    `run`: the head's forward, hidden (n, H) -> logits (n, V); `params`: what it trains; `targets`
    (N,) int64.
    """

    def chunk(part: Tensor, wanted: Tensor) -> Tensor:
        logits = scaling(run(part))
        if uses_triton(logits):
            return cross_entropy_rows(logits, wanted, IGNORE)  # no fp32 copy of the logits
        return F.cross_entropy(logits.float(), wanted, ignore_index=IGNORE, reduction="none")

    return in_rows(chunk, hidden, targets, rows=rows or chunk_rows(vocabulary), params=params)


def native_sum(head: nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    """Sum of cross-entropies by torch's chunked kernel, fp32."""
    loss = F.linear_cross_entropy(
        hidden, head.weight, targets, linear_bias=head.bias, reduction="sum", ignore_index=IGNORE,
        options=nn.LinearCrossEntropyOptions(),
    )  # fmt: skip
    return loss.float()


def stand_in(hidden: Tensor, losses: Tensor) -> Tensor:
    """Zeros in place of logits (..., 1), for nobody; autograd leads from them to what `losses` come
    of. DDP looks there for parameters without a gradient (a bank's other experts): from zeros
    alone all would have none, and their gradients come as a second one.
    """
    return (losses.sum() * 0).to(hidden.dtype).expand(*hidden.shape[:-1], 1)


Pick = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Hidden states (B, C, H) to the rows (N, H) whose losses are wanted, and their targets (N,)."""


@dataclass
class Answer:
    """The losses that were asked for: fp32 (N,), or () summed."""

    losses: Tensor | None = None


class LossHead:
    """Stands in for the head of a causal LM: inside `asking` it gives losses in place of logits.

    So the model is called through whatever wraps it (DDP, peft, FSDP), and its head is run where
    its weights are. The "logits" that the model then returns are a number a row, for nobody.
    """

    def __init__(self, model: Any, mode: str = "auto") -> None:
        self.head: nn.Module = model.get_output_embeddings()
        self.run: Callable[[Tensor], Tensor] = self.head.forward
        self.scaling, self.mode = scaling_of(model.config), mode
        self.vocabulary: int = self.head.weight.shape[0]  # type: ignore[index, union-attr]
        self._asked: tuple[Pick, bool, Answer] | None = None
        self.head.forward = self  # type: ignore[method-assign]

    def wanted(self, tokens: int) -> bool:
        """Whether the logits of so many tokens are better not made. Few are: one product and no
        recomputation.
        """
        if self.mode == "auto":
            return tokens * self.vocabulary > _LOGITS
        return self.mode == "chunked"

    @contextmanager
    def asking(self, pick: Pick, *, summed: bool) -> Iterator[Answer]:
        answer = Answer()
        self._asked = pick, summed, answer
        try:
            yield answer
        finally:
            self._asked = None

    def __call__(self, hidden: Tensor) -> Tensor:
        if self._asked is None:
            return self.run(hidden)
        pick, summed, answer = self._asked
        rows, targets = pick(hidden)
        head = self.head
        if summed and self._is_plain() and _native_fits(rows, head):
            assert isinstance(head, nn.Linear)
            answer.losses = native_sum(head, rows, targets)
        else:
            params = [p for p in head.parameters() if p.requires_grad]
            losses = token_losses(
                self.run, rows, targets, params=params, vocabulary=self.vocabulary,
                scaling=self.scaling,
            )  # fmt: skip
            answer.losses = losses.sum() if summed else losses
        return stand_in(hidden, answer.losses)

    def _is_plain(self) -> bool:
        """Whether the head is x W^T + b and nothing else: no adapter, no quantised weight."""
        head = self.head
        return (
            type(head) is nn.Linear
            and getattr(self.run, "__func__", None) is nn.Linear.forward
            and type(head.weight) is nn.Parameter
            and head.weight.dtype.is_floating_point
            and self.scaling == Scaling()
        )


def _native_fits(hidden: Tensor, head: nn.Module) -> bool:
    """Whether torch's kernel takes these: it is faster with more rows than columns (its docs), and
    does not look at autocast.
    """
    return (
        NATIVE
        and hidden.shape[0] >= hidden.shape[1]
        and hidden.dtype == head.weight.dtype
        and not torch.is_autocast_enabled(hidden.device.type)
    )


def loss_head(model: Any, mode: str | None = None) -> LossHead:
    """The model's one, made when first asked for; `mode`: auto, logits or chunked."""
    found = model.__dict__.get("loss_head")
    if found is None or model.get_output_embeddings() is not found.head:
        found = model.__dict__["loss_head"] = LossHead(model, mode or "auto")
    elif mode:
        found.mode = mode
    return found
