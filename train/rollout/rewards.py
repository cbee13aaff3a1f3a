"""What an episode earns: r1 .. r7, each a pure function of what happened.

r1 correct, r3 compression, r5 overrun and r6 stale belong to the episode; r2 valid, r4 supported
and r7 counterfactual to a turn. Mem-alpha (arXiv 2509.25911, eq. 1) has r1 to r4; what differs here
and why:

- r2 of silence. There a turn without a call earns 0, so a policy learns to chatter; if it earned 1,
  doing nothing would be the safest policy. Here silence earns 1 only where the stream is known to
  hold nothing worth storing, 0 where it is known to hold something, a half where nobody knows.
- r3 is paid only to an episode that answers no worse than its group does on average: an empty
  memory is perfectly compressed.
- r4 judges deletions like any other call. Scored 0, as in the released code, they are punished.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mnemic.models.memory.bm25 import words
from mnemic.models.memory.episode import MemoryEpisode, Turn
from mnemic.models.memory.metrics import score
from mnemic.models.memory.operations import Delete, Insert, Update
from mnemic.train.data.memory.episode import EpisodeRow

_KEPT_WORDS = 0.75
"""Share of a content's words that must stand in the chunk (or the entry it replaces)."""


@dataclass
class Outcome:
    """Raw rewards of one episode; lists have one value a turn."""

    correct: float
    compression: float
    overrun: float
    stale: float
    valid: list[float]
    supported: list[float]
    counterfactual: list[float] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)


def correct(row: EpisodeRow, asked: Sequence[int], answers: Sequence[str]) -> list[float]:
    """r1 is the mean of these: each question's score, 0 to 1, by the data's metric."""
    return [
        score(row.metric, answer, row.questions[i].answers, row.questions[i].type)
        for i, answer in zip(asked, answers, strict=True)
    ]


def valid(turn: Turn, worth: bool | None) -> float:
    """r2: share of calls carried out. `worth`: whether the chunk held something to store, None if
    that is not known.
    """
    result = turn.result
    if not result.errors and result.silent:
        # A `noop` and no answer at all are the same to the memory, not to a reader of calls.
        called = bool(result.applied)
        return {True: 0.0, False: float(called), None: 0.5 * called}[worth]
    return sum(one.ok for one in result.applied) / len(result.applied)


def compression(memory_tokens: int, stream_tokens: int) -> float:
    """r3: 1 - memory / stream, within 0 and 1."""
    return max(0.0, 1.0 - memory_tokens / max(1, stream_tokens))


def gate_compression(correct: Sequence[float], compression: Sequence[float]) -> list[float]:
    """r3 of a group's episodes, 0 for those that answer worse than the group's mean."""
    mean = sum(correct) / len(correct)
    return [c if r >= mean - 1e-9 else 0.0 for r, c in zip(correct, compression, strict=True)]


def supported(turn: Turn, gold: Sequence[dict[str, Any]] = ()) -> float:
    """r4: mean over the turn's calls of whether the chunk bears them out; a half without a call.

    A content is borne out by a chunk that has most of its words, those of the entry it replaces
    aside, or where the chunk's `gold` steps say the same; a deletion or update by a chunk that
    shares a word with the entry it ends.
    """
    chunk = set(words(turn.chunk))
    judged = []
    for one in turn.result.applied:
        if not one.ok or one.operation is None:
            judged.append(0.0)
            continue
        operation, before = one.operation, _before(turn, one.id)
        if isinstance(operation, Insert):
            judged.append(borne_out(operation.content, chunk, set(), gold))
        elif isinstance(operation, Update):
            right = borne_out(operation.content, chunk, before, gold)
            judged.append(right * bool(before & chunk))
        elif isinstance(operation, Delete):
            judged.append(float(bool(before & chunk)))
    return sum(judged) / len(judged) if judged else 0.5


def _before(turn: Turn, id: str | None) -> set[str]:
    """Words of an entry as the view showed it."""
    for line in turn.view.text.splitlines():
        head, _, content = line.partition(" ")
        if head == id:
            return set(words(content))
    return set()


def borne_out(
    content: str, chunk: set[str], before: set[str], gold: Sequence[dict[str, Any]] = ()
) -> float:
    """1 where the chunk's words, or a gold step of it, bear the content out, else 0.

    A fact put in other words ("Fay earns a living as a sailor": `fay job sailor`) has too few of
    the chunk's; where gold is known it is compared with that instead of asking less of all others.
    """
    own = words(content)
    for step in gold:
        known = set(words(step.get("content") or ""))
        if known and known <= set(own) <= known | chunk:
            return 1.0
    share = sum(word in chunk or word in before for word in own) / max(1, len(own))
    return float(share >= _KEPT_WORDS)


def overrun(memory_tokens: int, budget: int | None) -> float:
    """r5: minus the share by which the memory exceeds its budget."""
    return -max(0.0, memory_tokens / budget - 1.0) if budget else 0.0


def stale(row: EpisodeRow, asked: Sequence[int], answers: Sequence[str]) -> float:
    """r6: minus the share of questions answered by a value that no longer holds."""
    wrong = [
        bool(row.questions[i].stale)
        and score(row.metric, answer, row.questions[i].stale) >= 1.0
        and score(row.metric, answer, row.questions[i].answers) < 1.0
        for i, answer in zip(asked, answers, strict=True)
    ]
    return -sum(wrong) / max(1, len(wrong))


def worth_storing(row: EpisodeRow) -> list[bool | None]:
    """By chunk, whether gold operations say that it holds something to store; None without them."""
    if not row.gold:
        return [None] * len(row.chunks)
    return [any(s["op"] in ("insert", "update", "delete") for s in steps) for steps in row.gold]


def outcome(
    episode: MemoryEpisode,
    row: EpisodeRow,
    asked: Sequence[int],
    answers: Sequence[str],
    *,
    budget: int | None = None,
) -> Outcome:
    """All rewards of a finished episode but r7, which needs answers of its own."""
    scores = correct(row, asked, answers)
    tokens = episode.store.tokens()
    return Outcome(
        correct=sum(scores) / max(1, len(scores)),
        compression=compression(tokens, episode.stream_tokens()),
        overrun=overrun(tokens, budget),
        stale=stale(row, asked, answers),
        valid=[
            valid(turn, worth)
            for turn, worth in zip(episode.turns, worth_storing(row), strict=True)
        ],
        supported=[
            supported(turn, steps)
            for turn, steps in zip(
                episode.turns, row.gold or ((),) * len(episode.turns), strict=True
            )
        ],
        answers=list(answers),
        scores=scores,
    )
