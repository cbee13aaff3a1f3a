"""LongMemEval (arXiv 2410.10813): chat histories of dated sessions between a user and an assistant,
one question for each history. The files are longmemeval_s, _m and _oracle.
"""

from collections.abc import Iterator
from typing import Any

from mnemic.models.memory.metrics import NONE
from mnemic.train.data.formats import FormatError
from mnemic.train.data.memory.episode import EpisodeRow, Question
from mnemic.train.data.memory.reading import (
    Paths,
    answer_text,
    check_chunk_chars,
    get,
    records,
    turn_chunks,
)

_NEEDS = (
    "question_id",
    "question_type",
    "question",
    "answer",
    "haystack_dates",
    "haystack_session_ids",
    "haystack_sessions",
    "answer_session_ids",
)


def longmemeval(path: Paths, chunk_chars: int = 4000) -> Iterator[EpisodeRow]:
    """One episode for each question of a LongMemEval file, read one at a time.

    Sessions come in the order of their dates (the oracle file does not sort them) and are cut
    between turns into chunks of at most `chunk_chars` characters. Evidence is the chunks with the
    turns marked `has_answer`, or the whole answer sessions if no turn is marked. Questions whose id
    ends in `_abs` have type `abstention` and the gold `none`; the day of asking stands before the
    question, since many ask how long ago something was.

    The benchmark grades with a language model. The metric here, `sub_em`, is a stand-in: it is too
    strict for wordy golds, and says nothing about `single-session-preference`, whose golds are
    rubrics.

    Raises:
        UserError: a missing or foreign file.
        FormatError: on the way, for a damaged record.
        ValueError: `chunk_chars` is too small.
    """
    check_chunk_chars(chunk_chars)
    found = records(path, "LongMemEval", _NEEDS)
    return (_episode(record, where, chunk_chars) for where, record in found)


def _episode(record: dict[str, Any], where: str, chunk_chars: int) -> EpisodeRow:
    name = get(record, "question_id", str, where)
    where = f"{where} ({name})"
    lists = [get(record, key, list, where) for key in _NEEDS[4:7]]
    if len({len(values) for values in lists}) != 1:
        counts = ", ".join(f"{len(v)} {k}" for k, v in zip(_NEEDS[4:7], lists, strict=True))
        raise FormatError(f"{where}: {counts}; needs the same number of each")
    answer_sessions = set(get(record, "answer_session_ids", list, where))

    chunks: list[str] = []
    evidence: set[int] = set()
    # "2023/05/20 (Sat) 02:21": the order of the text is the order in time.
    for date, session_id, turns in sorted(zip(*lists, strict=True), key=lambda s: str(s[0])):
        pieces, places = turn_chunks(str(date), _lines(turns, where), chunk_chars)
        if session_id in answer_sessions:
            marked = [p for p, t in zip(places, turns, strict=True) if t.get("has_answer")]
            evidence.update(len(chunks) + index for place in marked or places for index in place)
        chunks += pieces
    if not chunks:
        raise FormatError(f"{where}: the history has no session with turns")

    question = get(record, "question", str, where).strip()
    if record.get("question_date"):
        question = f"[{record['question_date']}] {question}"
    if name.endswith("_abs"):
        asked = Question(question, (NONE,), type="abstention")
    else:
        gold = answer_text(record["answer"], where)
        kind = get(record, "question_type", str, where)
        asked = Question(question, (gold,), type=kind, evidence=tuple(sorted(evidence)))
    return EpisodeRow(name, "longmemeval", tuple(chunks), (asked,), metric="sub_em")


def _lines(turns: Any, where: str) -> list[str]:
    if not isinstance(turns, list):
        raise FormatError(f"{where}: a session is a {type(turns).__name__}, not a list of turns")
    lines = []
    for turn in turns:
        content = get(turn, "content", str, where).strip()
        # A turn without text keeps its place in the list, and has no line in the chunk.
        lines.append(f"{get(turn, 'role', str, where)}: {content}" if content else "")
    return lines
