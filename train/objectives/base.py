"""What an objective is to the loop: batches for a step, and a loss for a batch. Nothing else
differs between methods.
"""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from mnemic.train.data.collate import Batch


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

    def metrics(self) -> dict[str, float]:
        """Running numbers for the row of a step, such as bad rows so far."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Where the data stands: plain numbers and lists."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        del state
