"""The teacher that makes no mistake: targets out of what the data itself knows.

Streams with gold operations (kvstream) give those of operations_rows.py. Where the data tells the
facts of each chunk instead (LoCoMo's observations), extraction is these facts, the update remembers
those that no entry shown says already, and the answer is the data's. Such facts never replace or
end another, so the update learns `+` and `noop` from them, no more. An answer that nothing
retrieved bears out is collected all the same: `clean` drops it, and counts it.
"""

from collections.abc import Sequence
from typing import Protocol

from mnemic.models.memory.op_prompts import parse_facts, write_facts
from mnemic.models.memory.operations import Insert, Noop
from mnemic.models.memory.operations import Operation as Call
from mnemic.models.memory.pipeline import apply_update
from mnemic.models.memory.store import Entry, Memory
from mnemic.models.memory.syntax import Lines
from mnemic.train.data.memory.episode import EpisodeRow, Question
from mnemic.train.data.memory.operations_rows import (
    ASKED,
    answer_of,
    facts_by_chunk,
    update_target,
)
from mnemic.train.distill.support import same_fact
from mnemic.train.errors import UserError


class Gold(Protocol):
    """Of one episode. `chunk`: its position."""

    def extract(self, chunk: int) -> str: ...
    def update(self, chunk: int, facts: Sequence[str], shown: Sequence[Entry]) -> str: ...
    def apply(
        self, chunk: int, store: Memory, reply: str, shown: Sequence[Entry], date: str | None
    ) -> None: ...
    def asks(self, question: Question) -> bool: ...
    def answer(self, question: Question, memories: Sequence[Entry]) -> str: ...


class StepGold:
    """From gold operations by chunk."""

    def __init__(self, row: EpisodeRow) -> None:
        self._by_chunk = facts_by_chunk(row)

    def extract(self, chunk: int) -> str:
        return write_facts(list(self._by_chunk[chunk].values()))

    def update(self, chunk: int, facts: Sequence[str], shown: Sequence[Entry]) -> str:
        return update_target(self._by_chunk[chunk], shown)

    def apply(
        self, chunk: int, store: Memory, reply: str, shown: Sequence[Entry], date: str | None
    ) -> None:
        # By all entries: one that the search missed must not stay in a memory that is right.
        entries = store.entries()
        target = update_target(self._by_chunk[chunk], entries)
        result = apply_update(store, target, entries, time=date)
        assert not result.errors, result.errors

    def asks(self, question: Question) -> bool:
        return question.type in ASKED

    def answer(self, question: Question, memories: Sequence[Entry]) -> str:
        return answer_of(question.q, question.answers[0], memories)


class FactGold:
    """From the facts of each chunk."""

    def __init__(self, row: EpisodeRow) -> None:
        # As the pipeline will read them: each once, in one line, none that a store would refuse.
        self._by_chunk = [parse_facts(write_facts(facts))[0] for facts in row.facts]

    def extract(self, chunk: int) -> str:
        return write_facts(self._by_chunk[chunk])

    def update(self, chunk: int, facts: Sequence[str], shown: Sequence[Entry]) -> str:
        said = [entry.content for entry in shown]
        new: list[Call] = []
        for fact in facts:
            if not any(same_fact(fact, other) for other in said):
                new.append(Insert(content=fact))
                said.append(fact)
        return Lines().write(new or [Noop()])

    def apply(
        self, chunk: int, store: Memory, reply: str, shown: Sequence[Entry], date: str | None
    ) -> None:
        apply_update(store, reply, shown, time=date)

    def asks(self, question: Question) -> bool:
        return True

    def answer(self, question: Question, memories: Sequence[Entry]) -> str:
        return question.answers[0]


def gold_of(row: EpisodeRow) -> Gold:
    """Of what the episode knows. Raises `UserError` where it knows nothing."""
    if row.gold:
        return StepGold(row)
    if row.facts:
        return FactGold(row)
    raise UserError(
        f"--teacher gold: {row.id} has neither gold operations nor facts by chunk (the key `gold` "
        "or `facts` of a jsonl row, `observation` of a LoCoMo conversation); give another teacher"
    )
