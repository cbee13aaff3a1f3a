"""The policy-gradient loss of GRPO's family, as a function of log-probabilities: dapo, grpo,
dr_grpo.

A clipped ratio to the policy that wrote the rows, times the advantage, and optionally the KL
divergence from a reference by the k3 estimator (DeepSeekMath, arXiv 2402.03300, eq. 1-4; times the
ratio, as DeepSeek-V3.2 corrects it, 2512.02556, and TRL does by default). The three
differ in their normalisation: dapo (2503.14476) a mean over all tokens, grpo a mean over rows of
each one's mean, dr_grpo (2503.20783) a sum over a constant length. Equal to TRL's for equal rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mnemic.train.data.collate import Batch, collate
from mnemic.train.data.tokenize import IGNORE, Example

Loss = Literal["dapo", "grpo", "dr_grpo"]
PREFIX = "policy_"
"""Of the batch's tensors that are not the model's: one fp32 value for each trained token (N,)."""


@dataclass(slots=True)
class PolicyRow:
    """A chunk's prompt and completion with its advantage. `old` and `reference`: log-probabilities
    of the completion's tokens under the policy that wrote it and the reference. `factor` weighs the
    row.
    """

    prompt: list[int]
    completion: list[int]
    advantage: float
    factor: float = 1.0
    old: list[float] | None = None
    reference: list[float] | None = None

    def example(self) -> Example:
        ids = self.prompt + self.completion
        labels = [IGNORE] * len(self.prompt) + self.completion
        return Example(ids, labels, (len(ids),), len(ids))


def weight_of(row: PolicyRow, loss: Loss) -> float:
    """The row's part of the loss's denominator."""
    return row.factor * (len(row.completion) if loss == "dapo" else 1.0)


def policy_batch(rows: Sequence[PolicyRow], *, loss: Loss, constant: int, pad_id: int) -> Batch:
    """A batch of rows; `constant` is the length dr_grpo divides by."""
    batch = collate([row.example() for row in rows], pad_id=pad_id, packed=False)
    lengths = [len(row.completion) for row in rows]
    share = {"dapo": lambda n: 1.0, "grpo": lambda n: 1.0 / n, "dr_grpo": lambda n: 1.0 / constant}
    per_row = {
        "advantage": [row.advantage for row in rows],
        "weight": [row.factor * share[loss](len(row.completion)) for row in rows],
    }
    counts = torch.tensor(lengths)
    for key, values in per_row.items():
        batch.tensors[PREFIX + key] = torch.tensor(values).repeat_interleave(counts)
    for key in ("old", "reference"):
        lists = [getattr(row, key) for row in rows]
        if all(found is not None for found in lists):
            flat = [value for found in lists for value in found]
            batch.tensors[PREFIX + key] = torch.tensor(flat, dtype=torch.float32)
    batch.weight = sum(weight_of(row, loss) for row in rows)
    return batch


def policy_loss(
    logprobs: Tensor, batch: Batch, *, clip_low: float, clip_high: float, beta: float
) -> tuple[Tensor, dict[str, float]]:
    """Sum of the weighted token losses, fp32, and sums for the step's row: clipped tokens, KL.

    `logprobs` fp32 (N,): of the batch's completion tokens, row by row.
    """
    tensors = {k: v for k, v in batch.tensors.items() if k.startswith(PREFIX)}
    advantage, weight = tensors[PREFIX + "advantage"], tensors[PREFIX + "weight"]
    old = tensors.get(PREFIX + "old")
    ratio = torch.exp(logprobs - (logprobs.detach() if old is None else old))
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    losses = -torch.minimum(ratio * advantage, clipped * advantage)
    sums: dict[str, float] = {}
    if old is not None:
        outside = (ratio < 1 - clip_low) & (advantage < 0)
        outside |= (ratio > 1 + clip_high) & (advantage > 0)
        sums["policy/clipped_tokens"] = float(outside.sum())
    if beta:
        gap = tensors[PREFIX + "reference"] - logprobs
        # Weighed by the ratio: without it the gradient is not that of the divergence.
        kl = (torch.exp(gap) - gap - 1) * ratio
        losses = losses + beta * kl
        sums["policy/kl_sum"] = float(kl.detach().sum())
    return (losses * weight).sum(), sums
