"""Rows, bad rows, and what becomes of a bad one. No torch here: data files are checked before
anything heavy loads.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from mnemic.train.errors import UserError

log = logging.getLogger("mnemic")

Position = list[int]
"""Where a source goes on reading: plain integers whose meaning is the source's own."""


@dataclass(frozen=True, slots=True)
class Row:
    fields: dict[str, Any]
    where: str
    """`file:line`, or the like."""
    after: Position
    """Behind this row."""
    again: bool = False
    """Whether an earlier pass over the data has given it: then it is not counted or reported."""

    def bad(self, reason: object) -> "BadRow":
        return BadRow(str(reason), self.where, self.after, self.again)


@dataclass(frozen=True, slots=True)
class BadRow:
    reason: str
    where: str
    after: Position
    again: bool = False


class Source(Protocol):
    def read(self, position: Position | None) -> Iterator[Row | BadRow]:
        """Rows from `position` on, None for the first; ends at the end of the data."""
        ...


class BadRows:
    """Counts bad rows; stops the run at the first, or reports the first few and goes on.

    `key` is the recipe section the rows come from, so that the sentence names the right setting.
    """

    REPORTED = 5

    def __init__(self, policy: str, *, key: str = "data", quiet: bool = False) -> None:
        self.policy, self.key, self.quiet = policy, key, quiet
        self.count = self.truncated = 0

    def add(self, bad: BadRow) -> None:
        if self.policy == "stop":
            raise UserError(
                f"{bad.where}: {bad.reason}; mend the row, "
                f"or set {self.key}.on_bad_row=skip to go on without such rows"
            )
        if bad.again:
            return
        self.count += 1
        if not self.quiet and self.count <= self.REPORTED:
            more = "; further bad rows are only counted" if self.count == self.REPORTED else ""
            log.warning("%s: %s; skipped%s", bad.where, bad.reason, more)

    def cut(self, row: Row, length: int, limit: int) -> None:
        """Count a row that lost its end."""
        if row.again:
            return
        self.truncated += 1
        if not self.quiet and self.truncated == 1:
            log.warning(
                "%s: %d tokens, cut to objective.max_length=%d; further cuts are only counted "
                "(data/truncated_rows)", row.where, length, limit,
            )  # fmt: skip
