"""MemoryAgentBench (arXiv 2507.05257, ai-hyz/MemoryAgentBench): one long context, many questions.
Its four abilities are retrieval, test-time learning, long-range understanding and conflicts.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

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
    split_text,
)
from mnemic.train.errors import UserError


class Kind(NamedTuple):
    ability: str
    metric: str


_RETRIEVAL = Kind("accurate_retrieval", "sub_em")

KINDS = {
    "ruler_": _RETRIEVAL,
    "eventqa": _RETRIEVAL,
    "longmemeval": _RETRIEVAL,
    "icl_": Kind("test_time_learning", "number"),
    "infbench": Kind("long_range_understanding", "rouge_l"),
    "detective": Kind("long_range_understanding", "em"),
    "factconsolidation": Kind("conflict_resolution", "sub_em"),
}
"""By the start of `metadata.source`. The benchmark grades `longmemeval` and `infbench` with a
language model and asks for the substring or ROUGE-L where there is none; those stand here."""


def memoryagentbench(
    path: Paths, sources: Sequence[str] | None = None, chunk_chars: int = 4096
) -> Iterator[EpisodeRow]:
    """One episode for each row of a parquet, JSONL or JSON file of the benchmark.

    The context is cut at blank lines, line ends or sentence ends into chunks of at most
    `chunk_chars` characters. A question's type is the ability, or the row's own type where it has
    one. `recsys_redial` has no episode: its golds are film numbers that only another file names.

    Args:
        sources: starts of the sources to read, such as `["icl_", "ruler_qa1"]`; None for all.

    Raises:
        UserError: a missing or foreign file, or one with none of the `sources`.
        FormatError: on the way, for a damaged row or a source without a metric.
        ValueError: `chunk_chars` is too small.
    """
    check_chunk_chars(chunk_chars)
    found = records(path, "MemoryAgentBench", ("context", "questions", "answers", "metadata"))
    return _episodes(found, path, sources, chunk_chars)


def _episodes(
    found: Iterator[Record], path: Paths, sources: Sequence[str] | None, chunk_chars: int
) -> Iterator[EpisodeRow]:
    seen: dict[str, int] = {}
    used = False
    for where, record in found:
        source = get(get(record, "metadata", dict, where), "source", str, where)
        seen[source] = seen.get(source, 0) + 1
        if sources is None or source.startswith(tuple(sources)):
            used = True
            yield _episode(record, source, seen[source], f"{where} ({source})", chunk_chars)
    if not used:
        raise UserError(
            f"data.path: {path} has no source that starts with {' or '.join(sources or ())}; "
            f"it has {', '.join(seen)}"
        )


def _episode(
    record: dict[str, Any], source: str, number: int, where: str, chunk_chars: int
) -> EpisodeRow:
    kind = next((kind for start, kind in KINDS.items() if source.startswith(start)), None)
    if kind is None:
        raise FormatError(
            f"{where}: no metric for this source; allowed are those that start with "
            f"{', '.join(KINDS)}, so choose them with sources=[...]"
        )
    chunks = split_text(get(record, "context", str, where), chunk_chars)
    asked, golds = (get(record, key, list, where) for key in ("questions", "answers"))
    if not chunks or not asked or len(asked) != len(golds):
        raise FormatError(
            f"{where}: {len(chunks)} chunks, {len(asked)} questions and {len(golds)} answers; "
            "needs a context, and one entry of answers for each question"
        )
    metadata = record["metadata"]
    questions = []
    for index, (text, gold) in enumerate(zip(asked, golds, strict=True)):
        place = f"{where}, question {index}"
        if not isinstance(text, str) or not text.strip():
            raise FormatError(f"{place}: {text!r} is no question; needs text")
        date = _nth(metadata, "question_dates", index)
        abstain = str(_nth(metadata, "question_ids", index)).endswith("_abs")
        values = gold if isinstance(gold, list) else [gold]
        answers = dict.fromkeys(answer_text(value, place) for value in values)
        if not answers:
            raise FormatError(f"{place}: no answers; needs at least one")
        own_type = _nth(metadata, "question_types", index)
        questions.append(
            Question(
                q=f"[{date}] {text.strip()}" if date else text.strip(),
                answers=(NONE,) if abstain else tuple(answers),
                type="abstention" if abstain else str(own_type or kind.ability),
            )
        )
    name = f"{source}-{number}"
    return EpisodeRow(name, source, tuple(chunks), tuple(questions), metric=kind.metric)


def _nth(metadata: dict[str, Any], key: str, index: int) -> Any:
    """An entry of one of the metadata's optional lists, None if it has none."""
    values = metadata.get(key)
    return values[index] if isinstance(values, list) and index < len(values) else None
