"""Held-out episodes played greedily: what a memory manager is worth, and what it did."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mnemic.models.memory.answer import Answerer
from mnemic.models.memory.episode import MemoryConfig, MemoryEpisode
from mnemic.train.data.memory.episode import EpisodeRow
from mnemic.train.rollout.play import Generator, ask_all, play
from mnemic.train.rollout.rewards import Outcome, outcome


@dataclass
class Played:
    """A finished episode with its rewards."""

    row: EpisodeRow
    episode: MemoryEpisode
    outcome: Outcome

    def operations(self) -> list[str]:
        """Names of the operations that were carried out."""
        return [
            one.operation.name
            for turn in self.episode.turns
            for one in turn.result.applied
            if one.ok and one.operation is not None
        ]

    def trace(self) -> dict[str, Any]:
        """All of it as plain values: a line of episodes.jsonl."""
        questions = [
            {"q": q.q, "answers": list(q.answers), "type": q.type, "said": said, "score": value}
            for q, said, value in zip(
                self.row.questions, self.outcome.answers, self.outcome.scores, strict=True
            )
        ]
        return {
            "id": self.row.id,
            "source": self.row.source,
            "turns": self.episode.trace(),
            "questions": questions,
            "memory": self.episode.store.snapshot(),
            "rewards": {
                "correct": self.outcome.correct, "compression": self.outcome.compression,
                "stale": self.outcome.stale, "valid": self.outcome.valid,
                "supported": self.outcome.supported,
            },
        }  # fmt: skip


@dataclass
class Player:
    """Plays episodes greedily and has their questions answered."""

    rows: Sequence[EpisodeRow]
    memory: MemoryConfig
    tokenizer: Any
    generator: Generator
    answerer: Answerer
    max_length: int
    latest: list[Played] = field(default_factory=list)

    def play(self, rank: int = 0, world: int = 1) -> list[Played]:
        """This rank's share of the episodes."""
        rows = list(self.rows)[rank::world]
        episodes = [MemoryEpisode(r.chunks, [q.q for q in r.questions], self.memory) for r in rows]
        self.generator.prepare()
        play(
            episodes, self.generator, self.tokenizer, max_length=self.max_length,
            max_new_tokens=self.memory.max_new_tokens,
        )  # fmt: skip
        asked = [list(range(len(row.questions))) for row in rows]
        answers = ask_all(episodes, asked, self.answerer)
        self.latest = [
            Played(row, episode, outcome(episode, row, questions, said))
            for row, episode, questions, said in zip(rows, episodes, asked, answers, strict=True)
        ]
        return self.latest


def sums(played: Sequence[Played]) -> dict[str, float]:
    """Figures to be added up over ranks and divided by `episodes`."""
    found = {"episodes": float(len(played))}
    for key, value in (
        ("r1", lambda p: p.outcome.correct),
        ("compression", lambda p: p.outcome.compression),
        ("stale", lambda p: -p.outcome.stale),
        ("memory_tokens", lambda p: p.episode.store.tokens()),
        ("entries", lambda p: len(p.episode.store.entries())),
        ("inserts", lambda p: p.operations().count("insert")),
        ("updates", lambda p: p.operations().count("update")),
        ("deletes", lambda p: p.operations().count("delete")),
        ("errors", lambda p: sum(len(t.result.errors) for t in p.episode.turns)),
    ):
        found[key] = float(sum(value(p) for p in played))
    return found
