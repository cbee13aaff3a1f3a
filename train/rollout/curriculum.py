"""Which episodes come next: stages by measured mastery, and priority to those of middling success.

Both are plain state machines on what rollouts earned; their state is in the checkpoint.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

from mnemic.train.data.memory.episode import EpisodeRow


class Staged(Protocol):
    """A source whose episodes depend on a stage."""

    stage: int

    @property
    def num_stages(self) -> int: ...


class Curriculum:
    """Moves a source to its next stage when the mean r1 of the last `window` steps reaches
    `mastery`; then counts anew.
    """

    def __init__(self, source: Staged, mastery: float, window: int = 8) -> None:
        self.source, self.mastery = source, mastery
        self.recent: deque[float] = deque(maxlen=window)

    def observe(self, correct: float) -> None:
        self.recent.append(correct)
        last = self.source.stage + 1 >= self.source.num_stages
        full = len(self.recent) == self.recent.maxlen
        if full and not last and sum(self.recent) / len(self.recent) >= self.mastery:
            self.source.stage += 1
            self.recent.clear()

    def state_dict(self) -> dict[str, Any]:
        return {"stage": self.source.stage, "recent": list(self.recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.source.stage = state["stage"]
        self.recent.clear()
        self.recent.extend(state["recent"])


class Priority:
    """Of `pool` times as many episodes as are wanted, those whose last score is nearest `anchor`:
    priority 1 - |score - anchor| (MemSifter, arXiv 2603.03379). One never played comes first.
    """

    def __init__(self, anchor: float, pool: int) -> None:
        self.anchor, self.pool = anchor, pool
        self.scores: dict[str, float] = {}

    def choose(self, rows: Sequence[EpisodeRow], count: int) -> list[EpisodeRow]:
        """`count` different ones of `rows` (more often only where there are too few), the order of
        the stream kept among equals.
        """
        different = list({row.id: row for row in rows}.values())
        if len(different) < count:
            return list(rows)[:count]
        return sorted(different, key=lambda row: -self.priority(row.id))[:count]

    def priority(self, id: str) -> float:
        score = self.scores.get(id)
        return 2.0 if score is None else 1.0 - abs(score - self.anchor)

    def observe(self, id: str, correct: float) -> None:
        self.scores[id] = correct

    def state_dict(self) -> dict[str, Any]:
        return {"scores": dict(self.scores)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scores = dict(state["scores"])
