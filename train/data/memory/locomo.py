"""LoCoMo (arXiv 2402.17753, snap-research/locomo): long conversations of two people over dated
sessions, with questions in five categories. One episode for each conversation.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from mnemic.models.memory.metrics import NONE
from mnemic.train.data.formats import FormatError
from mnemic.train.data.memory.episode import EpisodeRow, Question
from mnemic.train.data.memory.reading import (
    Paths,
    Record,
    answer_text,
    check_chunk_chars,
    get,
    records,
    turn_chunks,
)
from mnemic.train.errors import UserError

CATEGORIES = {
    1: "multi_hop",
    2: "temporal",
    3: "open_domain",
    4: "single_hop",
    5: "adversarial",
}

_SESSION = re.compile(r"session_(\d+)")
_DIALOG = re.compile(r"D:?(\d+):(\d+)")
"""The file holds "D8:6; D9:17", "D30:05" and "D:11:26" among its "D1:3"."""


def locomo(
    path: Paths, conversations: Sequence[int] | None = None, chunk_chars: int = 2000
) -> Iterator[EpisodeRow]:
    """Episodes of `locomo10.json`, or any file of its form.

    A chunk is a session, cut between turns into pieces of at most `chunk_chars` characters, each
    beginning with its date line. A picture stands as its caption. Evidence that names no turn of
    the conversation (the file has a few) is left out. `facts` are the observations, each with the
    first chunk that holds a turn it names. Adversarial questions have the gold `none`; their
    `adversarial_answer`, which holds of the other speaker, is in `stale`.

    Args:
        conversations: positions in the file, such as `range(6)`; None for all.

    Raises:
        UserError: a missing or foreign file, or a position that it does not have.
        FormatError: on the way, for a damaged conversation.
        ValueError: `chunk_chars` is too small.
    """
    check_chunk_chars(chunk_chars)
    found = records(path, "LoCoMo", ("sample_id", "conversation", "qa"))
    return _episodes(found, path, conversations, chunk_chars)


def _episodes(
    found: Iterator[Record], path: Paths, wanted: Sequence[int] | None, chunk_chars: int
) -> Iterator[EpisodeRow]:
    count = 0
    for index, (where, record) in enumerate(found):
        count = index + 1
        if wanted is None or index in wanted:
            yield _episode(record, f"{where} ({record['sample_id']})", chunk_chars)
    beyond = [index for index in wanted or () if not 0 <= index < count]
    if beyond:
        raise UserError(
            f"data.path: {path} has no conversation {beyond[0]}; it holds {count}, "
            f"choose conversations from 0 to {count - 1}"
        )


def _episode(record: dict[str, Any], where: str, chunk_chars: int) -> EpisodeRow:
    chunks, places = _chunks(get(record, "conversation", dict, where), where, chunk_chars)
    name = answer_text(record["sample_id"], where)
    if not chunks:
        raise FormatError(f"{where}: the conversation has no session with turns")
    questions = [
        _question(qa, f"{where}, question {index}", places)
        for index, qa in enumerate(get(record, "qa", list, where))
    ]
    facts = _observations(record.get("observation") or {}, f"{where}, observation", places)
    by_chunk = tuple(tuple(facts.get(index, ())) for index in range(len(chunks)))
    return EpisodeRow(
        name, "locomo", tuple(chunks), tuple(questions), metric="locomo",
        facts=by_chunk if facts else (),
    )  # fmt: skip


def _observations(
    found: Any, where: str, places: dict[tuple[int, int], list[int]]
) -> dict[int, list[str]]:
    """Facts by chunk; one that names no turn of the conversation is left out."""
    facts: dict[int, list[str]] = {}
    for key in found if isinstance(found, dict) else ():
        for speaker in get(found, key, dict, where):
            for item in get(found[key], speaker, list, f"{where}.{key}"):
                if not (isinstance(item, list) and len(item) == 2 and isinstance(item[0], str)):
                    raise FormatError(f"{where}.{key}: {item!r}; needs [text, dialogue id]")
                named = item[1] if isinstance(item[1], list) else [item[1]]
                held = [i for d in named for k in _dialogs(str(d)) for i in places.get(k, ())]
                if held and item[0].strip():
                    facts.setdefault(min(held), []).append(item[0].strip())
    return facts


def _chunks(
    conversation: dict[str, Any], where: str, chunk_chars: int
) -> tuple[list[str], dict[tuple[int, int], list[int]]]:
    """The chunks, and where each dialogue id lies in them."""
    chunks: list[str] = []
    places: dict[tuple[int, int], list[int]] = {}
    # By number, not by the order of the keys nor of their text (session_10 before session_2).
    numbers = sorted(int(m[1]) for key in conversation if (m := _SESSION.fullmatch(key)))
    for number in numbers:
        session = f"{where}, session_{number}"
        turns = get(conversation, f"session_{number}", list, session)
        date = get(conversation, f"session_{number}_date_time", str, session) if turns else ""
        lines = [_line(turn, session) for turn in turns]
        pieces, held = turn_chunks(date, lines, chunk_chars)
        for turn, indices in zip(turns, held, strict=True):
            for key in _dialogs(get(turn, "dia_id", str, session)):
                places[key] = [len(chunks) + index for index in indices]
        chunks += pieces
    return chunks, places


def _line(turn: Any, where: str) -> str:
    text = get(turn, "text", str, where).strip()
    caption = turn.get("blip_caption")
    shared = f" [shares a picture: {caption}]" if caption else ""
    return f"{get(turn, 'speaker', str, where)}: {text}{shared}"


def _dialogs(text: str) -> list[tuple[int, int]]:
    return [(int(session), int(turn)) for session, turn in _DIALOG.findall(text)]


def _question(qa: Any, where: str, places: dict[tuple[int, int], list[int]]) -> Question:
    category = get(qa, "category", int, where)
    if category not in CATEGORIES:
        raise FormatError(f"{where}: category {category}; allowed are 1 to {len(CATEGORIES)}")
    stale: tuple[str, ...] = ()
    if CATEGORIES[category] == "adversarial":
        gold = NONE
        if qa.get("adversarial_answer") is not None:
            stale = (answer_text(qa["adversarial_answer"], where),)
    else:
        gold = answer_text(qa.get("answer"), where)
    named = [key for text in get(qa, "evidence", list, where) for key in _dialogs(str(text))]
    evidence = {index for key in named for index in places.get(key, ())}
    return Question(
        q=get(qa, "question", str, where).strip(),
        answers=(gold,),
        type=CATEGORIES[category],
        evidence=tuple(sorted(evidence)),
        stale=stale,
    )
