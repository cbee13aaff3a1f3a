"""Divergence of two models' next-token distributions over the whole vocabulary, without logits:
(N, V) never exists for either of them.

As `loss.py`: both heads run on some rows at a time, and again in the backward, so memory is a few
tensors of chunk x vocabulary, whatever N.

The divergences are those of GKD (arXiv 2306.13649, eq. 1), as TRL's `GKDTrainer` and
`DistillationTrainer` compute them: both logits, after the model's own scaling and cap, are divided
by the temperature, and the result is not multiplied by its square (Hinton's paper does that). TRL's
`beta` 0 is `forward_kl` and 1 is `reverse_kl`; between them it is `jsd`'s, the teacher's weight in
the mixture. At its ends the generalised JSD itself is 0, not a KL, which is why they have names of
their own here. Values are sums over the vocabulary, one a row: the mean over tokens is for the
caller.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mnemic.models.exact.loss import IGNORE, Scaling, chunk_rows, loss_head, stand_in
from mnemic.models.exact.recompute import in_rows

Kind = Literal["forward_kl", "reverse_kl", "jsd"]


@dataclass(frozen=True)
class Divergence:
    """`beta`: of jsd alone, strictly between 0 and 1."""

    kind: Kind = "forward_kl"
    temperature: float = 1.0
    beta: float = 0.5

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Of logits (n, V) and (n, V), fp32 (n,)."""
        log_s, log_t = self._logprobs(student), self._logprobs(teacher)
        if self.kind == "forward_kl":
            return _kl(log_t, log_s)
        if self.kind == "reverse_kl":
            return _kl(log_s, log_t)
        mixture = torch.logaddexp(log_s + math.log1p(-self.beta), log_t + math.log(self.beta))
        return self.beta * _kl(log_t, mixture) + (1 - self.beta) * _kl(log_s, mixture)

    def _logprobs(self, logits: Tensor) -> Tensor:
        logits = logits.float()
        if self.temperature != 1.0:
            logits = logits / self.temperature
        return F.log_softmax(logits, dim=-1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities (n, V)."""
    return F.kl_div(q, p, reduction="none", log_target=True).sum(-1)


@dataclass(frozen=True)
class Head:
    """A model's head, apart from it: `run`, hidden (n, H) -> logits (n, V), what it trains, and
    what the model does to its output.
    """

    run: Callable[[Tensor], Tensor]
    params: tuple[Tensor, ...]
    scaling: Scaling
    vocabulary: int

    def logits(self, hidden: Tensor) -> Tensor:
        return self.scaling(self.run(hidden))


def head_of(model: Any) -> Head:
    """Of a transformers model without wrappers; a head with an adapter on it runs with it."""
    own = loss_head(model)
    trained = tuple(p for p in own.head.parameters() if p.requires_grad)
    return Head(own.run, trained, own.scaling, own.vocabulary)


@contextmanager
def at_head(model: Any, look: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """In this context the model's head gives its input (B, T, H) to `look` and makes no logits: the
    "logits" that come back are a number a row. `look` runs inside the model's forward, where its
    weights are whatever wraps it, and gives what a loss is made of (None without a backward).
    """
    own = loss_head(model)

    def forward(hidden: Tensor) -> Tensor:
        found = look(hidden)
        return stand_in(hidden, hidden.new_zeros(()) if found is None else found)

    own.head.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        own.head.forward = own  # type: ignore[method-assign]


def chunked_divergence(
    student_hidden: Tensor, student: Head, teacher_hidden: Tensor, teacher: Head,
    divergence: Divergence, *, chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """Divergence of each row, fp32 (N,), with gradients to the student's hidden states and head.

    `student_hidden` (N, H), `teacher_hidden` (N, H'), for the same tokens. Where one head has more
    rows, those beyond the other's are left out of both distributions. `chunk`: rows at once, made
    again in the backward; None: by the vocabulary; 0: all of them, made once and kept.
    """
    common = min(student.vocabulary, teacher.vocabulary)

    def one(mine: Tensor, other: Tensor) -> Tensor:
        return divergence(_cut(student.logits(mine), common), _teacher(teacher, other, common))

    return _by_chunks(one, student, chunk, student_hidden, teacher_hidden)


def chunked_losses(
    student_hidden: Tensor, student: Head, teacher_hidden: Tensor, teacher: Head, targets: Tensor,
    divergence: Divergence, *, chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """As `chunked_divergence`, and beside it the student's cross-entropy of `targets` (N,) at
    temperature 1, from the same logits: fp32 (N, 2). 0 where a target is `IGNORE`.
    """
    common = min(student.vocabulary, teacher.vocabulary)

    def both(mine: Tensor, other: Tensor, wanted: Tensor) -> Tensor:
        logits = student.logits(mine)
        found = divergence(_cut(logits, common), _teacher(teacher, other, common))
        hard = F.cross_entropy(logits.float(), wanted, ignore_index=IGNORE, reduction="none")
        return torch.stack((found, hard), dim=-1)

    return _by_chunks(both, student, chunk, student_hidden, teacher_hidden, targets)


def _by_chunks(
    function: Callable[..., Tensor], student: Head, chunk: int | None, x: Tensor, *extra: Tensor
) -> Tensor:
    if chunk == 0:
        return function(x, *extra)
    # Both models' logits and log-probabilities are held: half as many rows as for one.
    rows = chunk or max(64, chunk_rows(student.vocabulary) // 2)
    return in_rows(function, x, *extra, rows=rows, params=student.params)


@torch.no_grad()
def _teacher(teacher: Head, hidden: Tensor, common: int) -> Tensor:
    return _cut(teacher.logits(hidden), common)


def _cut(logits: Tensor, common: int) -> Tensor:
    return logits if logits.shape[-1] == common else logits[..., :common]
