"""Who answers questions from a memory: one protocol, whatever stands behind it.

Training needs it frozen, evaluation needs it swapped: rule_reader.py (exact, for generated
streams), model_reader.py (the same model with its adapters off, or any local one) and
endpoint_reader.py (any OpenAI-compatible endpoint). All answer greedily.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mnemic.models.memory.store import Memory


@dataclass(frozen=True, slots=True)
class Ask:
    """A question and the memory it is asked of."""

    question: str
    memory: Memory


class Answerer(Protocol):
    """Answers questions from memories, in batches: a rule, a local model, or an endpoint."""

    def answer(self, asks: Sequence[Ask]) -> list[str]:
        """One answer for each, in their order; "none" where the memory does not say."""
        ...
