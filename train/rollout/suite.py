"""A memory manager played over held-out episodes, and the figures of what came of it.

`read_all` plays, `figures` sums up; baselines.py gives the same `Reading`s without a manager. Where
a stream's gold operations are known, `operation_scores` compares what was done with them.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mnemic.models.generation import Generated
from mnemic.models.memory.answer import Answerer
from mnemic.models.memory.bm25 import words
from mnemic.models.memory.episode import MemoryConfig, Turn
from mnemic.models.memory.metrics import exact_match, f1
from mnemic.models.memory.operations import CoreRewrite, Delete, Insert, Update
from mnemic.train.data.memory.episode import EpisodeRow
from mnemic.train.data.memory.teacher import net
from mnemic.train.errors import UserError
from mnemic.train.rollout.evaluate import Player
from mnemic.train.rollout.play import Generator
from mnemic.train.rollout.rewards import borne_out, compression, correct, stale

_RESAMPLES = 2000


@dataclass
class Reading:
    """A stream that was read, and the answers to all its questions. `turns` are a manager's; a
    memory that was put there has none. Tokens are the store's.
    """

    row: EpisodeRow
    answers: list[str]
    memory_tokens: int
    stream_tokens: int
    entries: int
    turns: list[Turn] = field(default_factory=list)

    @property
    def scores(self) -> list[float]:
        """Of each question, by the data's metric."""
        return correct(self.row, range(len(self.row.questions)), self.answers)


@dataclass
class Manager:
    """A model that manages memories, and how. `context`: tokens of prompt and answer together that
    it can take; None for any number.
    """

    memory: MemoryConfig
    tokenizer: Any
    generator: Generator
    context: int | None = None


@dataclass
class Cost:
    """Tokens written and seconds spent on writing them, prompts read included."""

    tokens: int = 0
    seconds: float = 0.0


class Meter:
    """A generator that counts what another one writes. `UserError` for a prompt that leaves no room
    for the answer.
    """

    def __init__(self, manager: Manager) -> None:
        self.manager, self.cost = manager, Cost()

    def prepare(self) -> None:
        self.manager.generator.prepare()

    def __call__(
        self, prompts: Sequence[list[int]], seeds: Sequence[int] | None
    ) -> list[Generated]:
        context, new = self.manager.context, self.manager.memory.max_new_tokens
        longest = max(map(len, prompts), default=0)
        if context is not None and longest + new > context:
            raise UserError(
                f"a chunk with its memory takes {longest} tokens, and with {new} for the answer "
                f"more than the model's context of {context}; lower memory.view_tokens or "
                "memory.max_new_tokens (--set), or take a suite with shorter chunks"
            )
        start = time.perf_counter()
        found = self.manager.generator(prompts, seeds)
        self.cost.seconds += time.perf_counter() - start
        self.cost.tokens += sum(len(one.ids) for one in found)
        return found


def read_all(
    rows: Sequence[EpisodeRow], manager: Manager, answerer: Answerer
) -> tuple[list[Reading], Cost]:
    """All `rows` read greedily by `manager`, their questions answered by `answerer`."""
    meter = Meter(manager)
    # The meter knows the model's own bound; a recipe's max_length is about training rows.
    player = Player(rows, manager.memory, manager.tokenizer, meter, answerer, max_length=1 << 60)
    readings = [
        Reading(
            one.row, one.outcome.answers, one.episode.store.tokens(), one.episode.stream_tokens(),
            len(one.episode.store.entries()), one.episode.turns,
        )
        for one in player.play()
    ]  # fmt: skip
    return readings, meter.cost


def figures(by_seed: Sequence[Sequence[Reading]], cost: Cost | None = None) -> dict[str, Any]:
    """What the readings are worth, each seed's a list of its own; None where there is nothing to
    measure.

    `accuracy`, `f1`, `em` and `stale` are means over questions, 0 to 1; `r1` is the mean over
    episodes of their questions' mean, the figure of training. The interval is a bootstrap over
    episodes, 95 %. Operations and errors are counts a chunk; `seconds_per_chunk` shares out the
    time of batches.
    """
    readings = [one for seed in by_seed for one in seed]
    scores = [one.scores for one in readings]
    total = sum(map(len, scores))
    said = [
        (answer, question)
        for one in readings
        for answer, question in zip(one.answers, one.row.questions, strict=True)
    ]
    low, high = interval(scores)
    found: dict[str, Any] = {
        "episodes": len(readings),
        "questions": total,
        "accuracy": _mean([s for own in scores for s in own]),
        "accuracy_low": low,
        "accuracy_high": high,
        "accuracy_by_seed": [_mean([s for one in seed for s in one.scores]) for seed in by_seed],
        "r1": _mean([_mean(own) or 0.0 for own in scores]),
        "f1": _mean([f1(answer, q.answers) for answer, q in said]),
        "em": _mean([exact_match(answer, q.answers) for answer, q in said]),
        "by_type": _by_type(readings),
        "stale": sum(
            -stale(one.row, range(len(one.answers)), one.answers) * len(one.answers)
            for one in readings
        ) / max(1, total),
        "memory_tokens": _mean([one.memory_tokens for one in readings]),
        "compression": _mean([compression(o.memory_tokens, o.stream_tokens) for o in readings]),
        "entries": _mean([one.entries for one in readings]),
    }  # fmt: skip
    turns = [turn for one in readings for turn in one.turns]
    if turns:
        found |= _of_turns(readings, turns)
        if cost is not None:
            found["generated_tokens_per_chunk"] = cost.tokens / len(turns)
            found["seconds_per_chunk"] = cost.seconds / len(turns)
    return found


def interval(scores: Sequence[Sequence[float]]) -> tuple[float | None, float | None]:
    """95 % percentile bootstrap of the mean over questions, episodes drawn with their questions:
    those of one stream stand or fall together. None for fewer than 2 episodes.
    """
    import numpy as np

    if len(scores) < 2:
        return None, None
    sums = np.array([sum(own) for own in scores])
    counts = np.array([len(own) for own in scores])
    draw = np.random.default_rng(0)
    means = []
    for _ in range(_RESAMPLES):
        chosen = draw.integers(len(scores), size=len(scores))
        means.append(sums[chosen].sum() / max(1, counts[chosen].sum()))
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


@dataclass
class OperationScores:
    """Counts: operations carried out, those of them that were right, gold steps, and those of them
    that were met; writes of text, and those that their chunk does not bear out.
    """

    done: int = 0
    right: int = 0
    gold: int = 0
    met: int = 0
    written: int = 0
    unsupported: int = 0

    def __add__(self, other: "OperationScores") -> "OperationScores":
        mine, theirs = vars(self), vars(other)
        return OperationScores(**{name: mine[name] + theirs[name] for name in mine})


def operation_scores(reading: Reading) -> OperationScores:
    """What was carried out in each turn against the gold steps of its chunk.

    Of several steps on one key in a chunk only what comes of them counts (`net`). A write is right
    if it holds all words of a gold content (key and value), and is an update of an entry of that
    key, or an insert where the memory had none: an insert beside a superseded entry, or a second
    one, is not. A deletion is right if the entry held all words of a gold deletion's key. Gold is
    met by at least one right operation. `noop` and `core_rewrite` are judged by neither; a refused
    call is an error, not an operation.

    A write is unsupported where reward r4 says so: under three quarters of its words stand in the
    chunk or in what it replaces.
    """
    found = OperationScores()
    held: dict[str, set[str]] = {}
    core: set[str] = set()
    steps = reading.row.gold or ((),) * len(reading.turns)
    for turn, said, wanted in zip(reading.turns, steps, net(steps), strict=True):
        chunk = set(words(turn.chunk))
        met: set[str] = set()
        for one in turn.result.applied:
            operation, id = one.operation, one.id
            if not one.ok or operation is None:
                continue
            if isinstance(operation, CoreRewrite):
                found.written += 1
                found.unsupported += not borne_out(operation.content, chunk, core, said)
                core = set(words(operation.content))
            if not isinstance(operation, (Insert, Update, Delete)) or id is None:
                continue
            before = held.pop(id, set())
            hits = _hits(operation, before, held, wanted)
            if not isinstance(operation, Delete):
                found.written += 1
                found.unsupported += not borne_out(operation.content, chunk, before, said)
                held[id] = set(words(operation.content))
            if reading.row.gold:
                found.done += 1
                found.right += bool(hits)
                met |= hits
        found.gold += len(wanted)
        found.met += len(met)
    return found


def _hits(
    operation: Insert | Update | Delete, before: set[str], held: dict[str, set[str]],
    wanted: dict[str, str | None],
) -> set[str]:  # fmt: skip
    """Keys of `wanted` that the operation settles. `before`: words of the entry it touched; `held`:
    those of all others.
    """
    found = set()
    for key, content in wanted.items():
        own = set(words(key))
        if isinstance(operation, Delete):
            good = content is None and own <= before
        elif content is None or not set(words(content)) <= set(words(operation.content)):
            good = False
        elif isinstance(operation, Update):
            good = own <= before
        else:
            good = not any(own <= text for text in held.values())
        if good:
            found.add(key)
    return found


def _of_turns(readings: Sequence[Reading], turns: Sequence[Turn]) -> dict[str, Any]:
    named = Counter(
        one.operation.name
        for turn in turns
        for one in turn.result.applied
        if one.ok and one.operation is not None
    )
    scores = sum((operation_scores(one) for one in readings), OperationScores())
    return {
        "operations_per_chunk": {name: n / len(turns) for name, n in sorted(named.items())},
        "errors_per_chunk": sum(len(turn.result.errors) for turn in turns) / len(turns),
        "op_precision": scores.right / scores.done if scores.done else None,
        "op_recall": scores.met / scores.gold if scores.gold else None,
        "unsupported_writes": scores.unsupported / scores.written if scores.written else None,
    }


def _by_type(readings: Sequence[Reading]) -> dict[str, dict[str, float]]:
    found: dict[str, list[float]] = {}
    for one in readings:
        for question, value in zip(one.row.questions, one.scores, strict=True):
            found.setdefault(question.type, []).append(value)
    return {
        name: {"accuracy": sum(own) / len(own), "questions": len(own)}
        for name, own in sorted(found.items())
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
