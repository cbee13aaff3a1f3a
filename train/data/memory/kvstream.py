"""Generated streams whose right memory is known at every moment: facts arrive, change, end and are
asked for.

Each event is a line: a new fact (`anna city rome`), an update, a retraction, a repetition, or small
talk. Gold operations, answers and superseded values come with every episode, so rewards, operation
scores and staleness are exact and need no judge. `style: natural` says the same in sentences, with
names, values and templates that the two splits do not share; `wide` has more of them for training.
"""

import random
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from mnemic.train.data.memory import kvstream_wide as wide_words
from mnemic.train.data.memory.episode import EpisodeRow, Question
from mnemic.train.data.memory.kvstream_words import (
    ATTRIBUTES,
    CLASSES,
    NAMES,
    NATURAL,
    SMALL_TALK,
    Wording,
)

Split = Literal["train", "heldout"]
QUESTION_TYPES = ("current", "updated", "abstain", "previous", "count", "same")


def _mix() -> dict[str, float]:
    return {"current": 0.4, "updated": 0.4, "abstain": 0.2}


@dataclass(frozen=True)
class KvStream:
    """The knobs. Probabilities are of one event; what is left over is a new fact."""

    n_chunks: int = 4
    events_per_chunk: int = 2
    p_update: float = 0.25
    p_delete: float = 0.1
    p_noise: float = 0.3
    p_repeat: float = 0.0
    n_entities: int = 8
    n_attributes: int = 4
    n_values: int = 8
    gap: int = 1
    """Chunks at least between a write and its change."""
    questions: int = 4
    mix: dict[str, float] = field(default_factory=_mix)
    """Weights of question types: current (never changed), updated, abstain (ended, or never said),
    previous, count, same (2-hop).
    """
    style: Literal["plain", "natural", "wide"] = "plain"
    """wide: natural, with many more words and sentences in training (kvstream_wide.py)."""
    family: Literal["facts", "labels"] = "facts"
    """labels: classes and their numbers, repeated often, as in test-time learning."""
    dates: bool = False
    """Begin each chunk with a date."""

    def __post_init__(self) -> None:
        share = self.p_update + self.p_delete + self.p_repeat
        if share > 1:
            raise ValueError(f"p_update + p_delete + p_repeat is {share:g}, at most 1")
        unknown = set(self.mix) - set(QUESTION_TYPES)
        if unknown:
            raise ValueError(
                f"unknown question type {min(unknown)!r}; there are {', '.join(QUESTION_TYPES)}"
            )


class _Fact(NamedTuple):
    entity: str
    attribute: str


@dataclass
class _World:
    """What holds now, what it replaced, what ever held before, and when it was last written."""

    now: dict[_Fact, str] = field(default_factory=dict)
    replaced: dict[_Fact, str] = field(default_factory=dict)
    past: dict[_Fact, list[str]] = field(default_factory=dict)
    written: dict[_Fact, int] = field(default_factory=dict)


def episode(config: KvStream, split: str, index: int, seed: int = 0) -> EpisodeRow:
    """Episode `index` of a split: a function of its arguments."""
    draw = random.Random(f"kvstream {split} {seed} {index}")
    entities, values = _draw_vocabulary(config, split, draw)
    wide = config.style == "wide" and split == "train"
    wording = (
        Wording() if config.style == "plain" else wide_words.WORDING if wide else NATURAL[split]
    )
    world = _World()
    chunks, gold = [], []
    for number in range(config.n_chunks):
        lines, steps = [], []
        if config.dates:
            lines.append(f"date 2024-{1 + number // 28 % 12:02d}-{1 + number % 28:02d}")
        for _ in range(config.events_per_chunk):
            line, step = _event(config, world, number, entities, values, wording, split, draw)
            lines.append(line)
            steps.append(step)
        chunks.append("\n".join(lines))
        gold.append(tuple(steps))
    questions = _questions(config, world, entities, values, wording, draw)
    return EpisodeRow(
        f"kvstream-{split}-{seed}-{index}", "kvstream", tuple(chunks), tuple(questions), "em",
        tuple(gold),
    )  # fmt: skip


def _draw_vocabulary(
    config: KvStream, split: str, draw: random.Random
) -> tuple[list[str], dict[str, list[str]]]:
    if config.family == "labels":
        entities = draw.sample(CLASSES, min(config.n_entities, len(CLASSES)))
        return entities, {"label": [str(n) for n in range(max(2, config.n_values))]}
    natural = config.style != "plain"
    wide = config.style == "wide" and split == "train"
    names = NAMES if not natural else [n for i, n in enumerate(NAMES) if _own(i, split)]
    if wide:
        entities = wide_words.names(names, config.n_entities, draw)
    else:
        entities = draw.sample(names, min(config.n_entities, len(names)))
    chosen = list(ATTRIBUTES)[: config.n_attributes]
    values = {}
    for attribute in chosen:
        pool = ATTRIBUTES[attribute]
        pool = pool if not natural else [v for i, v in enumerate(pool) if _own(i, split)]
        values[attribute] = (
            wide_words.values(pool, attribute, config.n_values, draw)
            if wide
            else pool[: config.n_values]
        )
    return entities, values


def _own(index: int, split: str) -> bool:
    """Natural streams of the two splits share no name and no value: every third is held out."""
    return (index % 3 == 2) == (split == "heldout")


def _event(
    config: KvStream, world: _World, number: int, entities: list[str],
    values: dict[str, list[str]], wording: Wording, split: str, draw: random.Random,
) -> tuple[str, dict[str, Any]]:  # fmt: skip
    if draw.random() < config.p_noise:
        pool = [t for i, t in enumerate(SMALL_TALK) if _own(i, split) or config.style == "plain"]
        if config.style == "wide" and split == "train":
            pool += wide_words.SMALL_TALK
        text = draw.choice(pool)
        return text, {"op": "noise", "content": text}
    changeable = [f for f in world.now if number - world.written[f] >= config.gap]
    at = draw.random()
    kind = "new"
    for name, share in (
        ("update", config.p_update), ("delete", config.p_delete), ("repeat", config.p_repeat),
    ):  # fmt: skip
        if 0 <= at < share:
            kind = name
        at -= share
    if changeable and kind == "update":
        fact = draw.choice(changeable)
        return _change(world, fact, number, values, wording, draw)
    if changeable and kind == "delete":
        fact = draw.choice(changeable)
        value = world.now.pop(fact)
        world.replaced.pop(fact, None)
        world.past.setdefault(fact, []).append(value)
        world.written[fact] = number
        step = {"op": "delete", "key": f"{fact.entity} {fact.attribute}"}
        return wording.retract(draw, fact.entity, fact.attribute, value), step
    if world.now and kind == "repeat":
        fact = draw.choice(list(world.now))
        step = {"op": "repeat", "key": f"{fact.entity} {fact.attribute}"}
        return wording.state(draw, fact.entity, fact.attribute, world.now[fact]), step
    fresh = [_Fact(e, a) for e in entities for a in values if _Fact(e, a) not in world.now]
    if not fresh:
        return _change(world, draw.choice(list(world.now)), number, values, wording, draw)
    fact = draw.choice(fresh)
    value = world.now[fact] = draw.choice(values[fact.attribute])
    world.written[fact] = number
    key = f"{fact.entity} {fact.attribute}"
    step = {"op": "insert", "key": key, "content": f"{key} {value}"}
    return wording.state(draw, fact.entity, fact.attribute, value), step


def _change(
    world: _World, fact: _Fact, number: int, values: dict[str, list[str]], wording: Wording,
    draw: random.Random,
) -> tuple[str, dict[str, Any]]:  # fmt: skip
    old = world.now[fact]
    value = draw.choice([v for v in values[fact.attribute] if v != old])
    world.past.setdefault(fact, []).append(old)
    world.now[fact], world.written[fact], world.replaced[fact] = value, number, old
    key = f"{fact.entity} {fact.attribute}"
    step = {"op": "update", "key": key, "content": f"{key} {value}"}
    return wording.change(draw, fact.entity, fact.attribute, value), step


def _questions(
    config: KvStream, world: _World, entities: list[str], values: dict[str, list[str]],
    wording: Wording, draw: random.Random,
) -> list[Question]:  # fmt: skip
    every = [_Fact(e, a) for e in entities for a in values]
    gone = [f for f in every if f not in world.now and f in world.past]
    never = [f for f in every if f not in world.now and f not in world.past]
    pools: dict[str, list[_Fact]] = {
        "current": [f for f in world.now if f not in world.past],
        "updated": [f for f in world.now if f in world.past],
        "abstain": gone + draw.sample(never, min(len(never), max(1, len(gone)))),
        "previous": list(world.replaced),
        "count": list(world.now),
        "same": [f for f in world.now if _twin(world, f)],
    }
    for pool in pools.values():
        draw.shuffle(pool)
    found: list[Question] = []
    kinds = [k for k in QUESTION_TYPES if config.mix.get(k)]
    while len(found) < config.questions:
        kinds = [k for k in kinds if pools[k]]
        if not kinds:
            break
        kind = draw.choices(kinds, [config.mix[k] for k in kinds])[0]
        found.append(_question(kind, pools[kind].pop(), world, wording))
    return found


def _twin(world: _World, fact: _Fact) -> str | None:
    """The one other entity with the same value, if there is exactly one."""
    others = [
        f.entity for f, v in world.now.items()
        if f.attribute == fact.attribute and v == world.now[fact] and f != fact
    ]  # fmt: skip
    return others[0] if len(others) == 1 else None


def _question(kind: str, fact: _Fact, world: _World, wording: Wording) -> Question:
    evidence = (world.written[fact],) if fact in world.written else ()
    past = tuple(dict.fromkeys(world.past.get(fact, ())))
    ask = wording.ask(kind, fact.entity, fact.attribute, world.now.get(fact, ""))
    if kind == "abstain":
        return Question(ask, ("none",), kind, evidence, past)
    now = world.now[fact]
    if kind in ("current", "updated"):
        return Question(ask, (now,), kind, evidence, tuple(v for v in past if v != now))
    if kind == "previous":
        return Question(ask, (world.replaced[fact],), kind, evidence)
    if kind == "count":
        same = sum(f.attribute == fact.attribute and v == now for f, v in world.now.items())
        return Question(ask, (str(same),), kind, evidence)
    return Question(ask, (_twin(world, fact) or "none",), kind, evidence)
