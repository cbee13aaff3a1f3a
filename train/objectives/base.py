"""What an objective is to the loop: batches for a step, and a loss for a batch. Nothing else
differs between methods.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mnemic.train.data.collate import Batch
from mnemic.train.data.tokenize import IGNORE


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """A model's `inputs`; the `columns` (C,) of positions whose next token is a target, None for
    all but the last; `targets` (B, C) int64, `IGNORE` where there is none.
    """

    inputs: dict[str, Tensor]
    columns: Tensor | None
    targets: Tensor

    def pick(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The rows (N, H) of the hidden states (B, T, H) that the head sees, and their targets
        (N,), `IGNORE` for some: the rows that the plain trainer's head sees, so that products of
        the same shape are rounded alike.
        """
        if self.columns is None:
            targets = F.pad(self.targets, (0, 1), value=IGNORE)
        else:
            hidden, targets = hidden[:, self.columns], self.targets
        return hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)

    def predicting(self) -> Tensor:
        """Which positions (B, T), bool, have a target."""
        ids = self.inputs["input_ids"]
        found = torch.zeros_like(ids, dtype=torch.bool)
        columns = slice(0, ids.shape[1] - 1) if self.columns is None else self.columns
        found[:, columns] = self.targets != IGNORE
        return found


class Objective(ABC):
    """Gives the trainer its batches and their loss."""

    @abstractmethod
    def microbatches(self, step: int) -> list[Batch]:
        """This rank's batches of optimizer step `step`, on the CPU; the same number on
        every rank.
        """

    @abstractmethod
    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Sum (not mean) of the batch's losses, fp32, and counts to add up over the step.

        The trainer divides by the weights of all batches of all ranks, so any split of a global
        batch gives the same gradient as one forward over all of it.
        """

    def tokens(self, batch: Batch) -> "TokenBatch":
        """What a streamed model needs of `batch`: where log-probabilities are wanted. An objective
        whose loss is no function of those does not offer it and is refused for streaming.
        """
        raise TypeError(f"{type(self).__name__} has no token log-probabilities")

    def loss_of(self, logprobs: Tensor, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """`loss`, from the log-probabilities fp32 (N,) of the targets that `tokens` names."""
        del batch
        return -logprobs.sum(), {}

    def metrics(self) -> dict[str, float]:
        """Running numbers for the row of a step, such as bad rows so far."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Where the data stands: plain numbers and lists."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state
