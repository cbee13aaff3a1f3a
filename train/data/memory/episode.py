"""The one row of the memory system: a stream cut into chunks, and the questions asked at its end.

Every loader and generator gives this row, and a JSONL file of our own holds one a line:

    {"id": "a-1", "source": "mine", "chunks": ["Anna moved to Rome.", "Anna now lives in Oslo."],
     "questions": [{"q": "Where does Anna live?", "answers": ["Oslo"], "type": "current",
                    "evidence": [1], "stale": ["Rome"]}],
     "metric": "em"}

No torch, numpy or transformers here: data is checked before anything heavy loads.
"""

import difflib
from dataclasses import dataclass
from typing import Any

from mnemic.models.memory.metrics import METRICS
from mnemic.train.data.formats import FormatError


@dataclass(frozen=True, slots=True)
class Question:
    q: str
    answers: tuple[str, ...]
    """Any one is right; `none` says that the stream does not tell."""
    type: str = "current"
    """For accuracy by type; a name of the data set's own."""
    evidence: tuple[int, ...] = ()
    """Indices of the chunks that hold the answer, ascending; empty if not known."""
    stale: tuple[str, ...] = ()
    """Values that were or seem right, and are wrong today."""


@dataclass(frozen=True, slots=True)
class EpisodeRow:
    id: str
    source: str
    chunks: tuple[str, ...]
    questions: tuple[Question, ...]
    metric: str = "em"
    """A name of `mnemic.models.memory.metrics.METRICS`."""
    gold: tuple[tuple[dict[str, Any], ...], ...] = ()
    """The right memory operations by chunk, where the data knows them."""
    facts: tuple[tuple[str, ...], ...] = ()
    """What is worth remembering of each chunk, as sentences, where the data tells."""


_ROW = ("id", "source", "chunks", "questions", "metric", "gold", "facts")
_STEPS = {
    "insert": ("key", "content"), "update": ("key", "content"), "delete": ("key",),
    "repeat": ("key",), "noise": ("content",),
}  # fmt: skip
_QUESTION = ("q", "answers", "type", "evidence", "stale")


def as_episode(fields: dict[str, Any]) -> EpisodeRow:
    """The episode of a JSON row. Nothing is converted and no unknown key is passed over.

    Raises:
        FormatError: what is wrong, in which question, and what is allowed.
    """
    _keys(fields, _ROW, ("id", "source", "chunks", "questions"), "the row")
    chunks = _texts(fields["chunks"], "chunks")
    questions = fields["questions"]
    if not isinstance(questions, list) or not questions:
        raise FormatError(f"questions: {_shown(questions)}; needs a list of at least one question")
    metric = fields.get("metric", "em")
    if not isinstance(metric, str) or metric not in METRICS:
        close = difflib.get_close_matches(str(metric), METRICS, 1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise FormatError(f"metric: {metric!r} is none of {', '.join(METRICS)}{hint}")
    return EpisodeRow(
        id=_text(fields["id"], "id"),
        source=_text(fields["source"], "source"),
        chunks=chunks,
        questions=tuple(
            _question(question, f"questions[{index}]", len(chunks))
            for index, question in enumerate(questions)
        ),
        metric=metric,
        gold=_gold(fields.get("gold", []), len(chunks)),
        facts=_facts(fields.get("facts", []), len(chunks)),
    )


def to_row(episode: EpisodeRow) -> dict[str, Any]:
    """The JSON row of an episode; `as_episode` gives the episode back. Empty options are left out.

    Lists and dicts of the row are its own, except the gold operations.
    """
    questions: list[dict[str, Any]] = []
    for question in episode.questions:
        row: dict[str, Any] = {
            "q": question.q,
            "answers": list(question.answers),
            "type": question.type,
        }
        if question.evidence:
            row["evidence"] = list(question.evidence)
        if question.stale:
            row["stale"] = list(question.stale)
        questions.append(row)
    fields: dict[str, Any] = {
        "id": episode.id,
        "source": episode.source,
        "chunks": list(episode.chunks),
        "questions": questions,
        "metric": episode.metric,
    }
    if episode.gold:
        fields["gold"] = [list(operations) for operations in episode.gold]
    if episode.facts:
        fields["facts"] = [list(facts) for facts in episode.facts]
    return fields


def _question(fields: Any, where: str, num_chunks: int) -> Question:
    _keys(fields, _QUESTION, ("q", "answers"), where)
    answers = _texts(fields["answers"], f"{where}.answers")
    evidence = fields.get("evidence", [])
    if not isinstance(evidence, list):
        raise FormatError(f"{where}.evidence: {_shown(evidence)}; needs a list of chunk indices")
    for index in evidence:
        # True is an int to Python, and no index to anybody else.
        if type(index) is not int or not 0 <= index < num_chunks:
            raise FormatError(
                f"{where}.evidence: {index!r} is no chunk; allowed are 0 to {num_chunks - 1}"
            )
    stale = _texts(fields.get("stale", []), f"{where}.stale", empty=True)
    right = {answer.casefold() for answer in answers}
    for value in stale:
        if value.casefold() in right:
            raise FormatError(
                f"{where}.stale: {value!r} is one of the answers too; "
                "stale values must be wrong answers"
            )
    return Question(
        q=_text(fields["q"], f"{where}.q"),
        answers=answers,
        type=_text(fields.get("type", "current"), f"{where}.type"),
        evidence=tuple(sorted(set(evidence))),
        stale=stale,
    )


def _gold(value: Any, num_chunks: int) -> tuple[tuple[dict[str, Any], ...], ...]:
    if not isinstance(value, list):
        raise FormatError(f"gold: {_shown(value)}; needs a list of operations for each chunk")
    if value and len(value) != num_chunks:
        raise FormatError(
            f"gold: {len(value)} lists of operations for {num_chunks} chunks; needs one a chunk, "
            "an empty one where nothing is to be done"
        )
    for index, operations in enumerate(value):
        if not isinstance(operations, list) or not all(isinstance(op, dict) for op in operations):
            raise FormatError(f"gold[{index}]: {_shown(operations)}; needs a list of JSON objects")
        for step in operations:
            needed = _STEPS.get(step.get("op"))
            if needed is None or not all(isinstance(step.get(key), str) for key in needed):
                raise FormatError(
                    f"gold[{index}]: {_shown(step)}; a step has an op of {', '.join(_STEPS)}, and "
                    "the strings key (but noise) and content (insert, update, noise)"
                )
    return tuple(tuple(operations) for operations in value)


def _facts(value: Any, num_chunks: int) -> tuple[tuple[str, ...], ...]:
    if not isinstance(value, list):
        raise FormatError(f"facts: {_shown(value)}; needs a list of texts for each chunk")
    if value and len(value) != num_chunks:
        raise FormatError(
            f"facts: {len(value)} lists for {num_chunks} chunks; needs one a chunk, an empty one "
            "where nothing is worth remembering"
        )
    return tuple(_texts(own, f"facts[{index}]", empty=True) for index, own in enumerate(value))


def _keys(fields: Any, allowed: tuple[str, ...], needed: tuple[str, ...], where: str) -> None:
    if not isinstance(fields, dict):
        raise FormatError(f"{where}: {_shown(fields)}; needs an object with {', '.join(needed)}")
    missing = [key for key in needed if key not in fields]
    if missing:
        have = ", ".join(map(str, fields)) or "nothing"
        raise FormatError(f"{where}: no {missing[0]!r}; needs {', '.join(needed)}, and has {have}")
    for key in fields:
        if key not in allowed:
            raise FormatError(f"{where}: unknown key {key!r}; allowed are {', '.join(allowed)}")


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise FormatError(f"{where}: {_shown(value)}; needs text that is not blank")
    return value


def _texts(value: Any, where: str, empty: bool = False) -> tuple[str, ...]:
    if not isinstance(value, list) or not (value or empty):
        raise FormatError(f"{where}: {_shown(value)}; needs a list of strings, such as ['...']")
    return tuple(_text(item, f"{where}[{index}]") for index, item in enumerate(value))


def _shown(value: Any) -> str:
    """The value in a sentence: its type, and the start of it."""
    if value is None:
        return "null"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"
