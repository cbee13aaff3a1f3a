"""Recipe part `sft`; `distill` has the same rows and builds on it."""

from typing import Literal

from pydantic import Field

from mnemic.train.recipe.base import Part


class SftObjective(Part):
    """Supervised fine-tuning on `messages` or `prompt` + `completion` rows."""

    kind: Literal["sft"] = "sft"
    loss_on: Literal["completion", "assistant", "all"] = "completion"
    """Tokens that are learned: the last assistant turn (or the completion), every assistant turn,
    or all.
    """
    max_length: int = Field(1024, ge=2)
    """Longest row, tokens."""
    too_long: Literal["truncate", "bad_row"] = "truncate"
    """A longer row loses its end (counted and reported), or counts as a bad row."""
    packing: bool = False
    """Join short rows into rows of `max_length`, attention and positions kept apart."""
    system: str | None = None
    """System message for conversations that bring none; `mnemic generate` uses it too."""
