"""The memory pipeline played over held-out streams by several systems, and the figures of each.

    experts   an adapter bank, each operation by its own expert
    base      the same model without adapters, by the same prompts
    shared    the same model with one adapter for all operations
    full      the base answers from the stream itself, cut to what its context holds
    rag       the answers come from the `TOP_K` chunks that a question finds

A system's outcome is plain values, so that it is kept in the report and its figures can be computed
again without a model.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mnemic.models.memory.metrics import NONE, abstains, normalize
from mnemic.models.memory.op_prompts import EXTRACT, GENERATE, OPERATIONS, generate_messages
from mnemic.models.memory.op_writer import Writer
from mnemic.models.memory.pipeline import MemoryPipeline, StageStats, retain_many
from mnemic.models.memory.stores import make_store
from mnemic.models.memory.text import first_line
from mnemic.train.data.memory.episode import EpisodeRow
from mnemic.train.data.memory.operations_rows import facts_by_chunk, operation_rows
from mnemic.train.data.memory.reading import dated
from mnemic.train.rollout.baselines import TOP_K, memory_of
from mnemic.train.rollout.operation_eval import (
    ExtractScores,
    OpTurn,
    answer_scores,
    extract_figures,
    extract_scores,
    from_json,
    record,
    update_figures,
    update_scores,
)

SYSTEMS = ("experts", "base", "shared", "full", "rag")
METRICS = ("score", "f1", "rouge_l", "meteor", "em")
"""Of answers; `score` is by the data's own metric (LoCoMo's F1 for LoCoMo)."""


@dataclass
class Outcome:
    """What one system wrote, a list for each row: turns (none where nothing was retained), answers,
    and what was kept in the end. `stats` by operation, over all rows. `verdicts`: a judge's.
    """

    name: str
    answers: list[list[str]]
    turns: list[list[OpTurn]] = field(default_factory=list)
    stats: dict[str, dict[str, Any]] = field(default_factory=dict)
    entries: list[int] = field(default_factory=list)
    memory_tokens: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    verdicts: list[list[bool]] | None = None

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "turns": [[asdict(turn) for turn in own] for own in self.turns]}

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> "Outcome":
        return cls(**{**raw, "turns": [[from_json(turn) for turn in own] for own in raw["turns"]]})


@dataclass(frozen=True)
class Settings:
    """Of the pipeline: entries found for a fact and for a question, tokens of a chunk's part."""

    k: int = 5
    answer_k: int = 10
    chunk_tokens: int = 1024


def play(
    name: str, rows: Sequence[EpisodeRow], writer: Writer, tokenizer: Any,
    settings: Settings | None = None, progress: Callable[[int, int], None] | None = None,
) -> Outcome:  # fmt: skip
    """The rows retained side by side by the pipeline, then their questions answered."""
    start = time.perf_counter()
    pipelines = _pipelines(len(rows), writer, tokenizer, settings or Settings())
    split = [[dated(chunk) for chunk in row.chunks] for row in rows]
    dates = [[date for date, _ in own] for own in split]
    kept = retain_many(
        pipelines, [[text for _, text in own] for own in split], dates, progress=progress
    )
    turns = [
        [record(one, dates[i][one.index]) for one in own] for i, own in enumerate(kept)
    ]  # fmt: skip
    answers = _ask(pipelines, rows)
    return Outcome(
        name, answers, turns, _stats(pipelines),
        [len(p.store.entries()) for p in pipelines], [p.store.tokens() for p in pipelines],
        seconds=time.perf_counter() - start,
    )  # fmt: skip


def play_rag(rows: Sequence[EpisodeRow], writer: Writer, tokenizer: Any) -> Outcome:
    """Chunks as entries, as they are; each question is asked of the `TOP_K` that it finds."""
    start = time.perf_counter()
    pipelines = [
        MemoryPipeline(writer, tokenizer, memory_of(row.chunks), answer_k=TOP_K) for row in rows
    ]
    answers = _ask(pipelines, rows)
    return Outcome(
        "rag", answers, [], _stats(pipelines),
        [len(row.chunks) for row in rows], [p.store.tokens() for p in pipelines],
        notes=[f"rag: answers come from the {TOP_K} chunks that a question finds"],
        seconds=time.perf_counter() - start,
    )  # fmt: skip


def play_full(rows: Sequence[EpisodeRow], writer: Writer) -> Outcome:
    """Each question asked of the last chunks of the stream, as many as the context holds."""
    start = time.perf_counter()
    stats, answers, entries, tokens = StageStats(), [], [], []
    shown = 0
    for row in rows:
        first = _first_that_fits(row, writer)
        chunks = row.chunks[first:]
        shown += len(chunks)
        prompts = [generate_messages(chunks, q.q) for q in row.questions]
        before = time.perf_counter()
        replies = writer.write(GENERATE, prompts)
        stats.seconds += time.perf_counter() - before
        stats.calls += len(prompts)
        stats.prompt_tokens += sum(reply.prompt_tokens for reply in replies)
        stats.new_tokens += sum(reply.new_tokens for reply in replies)
        answers.append([first_line(reply.text) for reply in replies])
        memory = memory_of(chunks)
        entries.append(len(chunks))
        tokens.append(memory.tokens())
    total = sum(len(row.chunks) for row in rows)
    note = f"full: shows {shown} of {total} chunks, the last of each stream"
    return Outcome(
        "full", answers, [], {GENERATE: _plain(stats)}, entries, tokens,
        notes=[note if shown < total else "full: shows the whole of each stream"],
        seconds=time.perf_counter() - start,
    )  # fmt: skip


def gold_facts(row: EpisodeRow) -> list[list[str]] | None:
    """Facts by chunk: the data's, or those of a generated stream; None where neither is known."""
    if row.facts:
        return [list(own) for own in row.facts]
    if row.gold:
        made = operation_rows(row, EXTRACT)
        return [json.loads(one["completion"][0]["content"]) for one in made]
    return None


def figures(outcome: Outcome, rows: Sequence[EpisodeRow]) -> dict[str, Any]:
    """`extract` and `update` (operation_eval.py; only where something was retained), the metrics of
    `METRICS` and `judged` over all questions, over those that have an answer, and by type;
    `operations`: calls, seconds and tokens; entries and tokens of the memories.
    """
    found: dict[str, Any] = {
        "episodes": len(rows),
        "questions": sum(len(r.questions) for r in rows),
    }
    if outcome.turns:
        by_chunk = [one for own in extraction(outcome, rows) for one in own]
        found["extract"] = extract_figures(by_chunk)
        found["update"] = update_figures(
            [
                one
                for row, own in zip(rows, outcome.turns, strict=True)
                for one in _updates(row, own)
            ]
        )
    marks = answers_of(outcome, rows)
    types = [q.type for row in rows for q in row.questions]
    told = [all(normalize(a) != NONE for a in q.answers) for row in rows for q in row.questions]
    found |= _means(marks)
    found["answerable"] = _means([m for m, has in zip(marks, told, strict=True) if has])
    found["by_type"] = {
        kind: _means([m for m, own in zip(marks, types, strict=True) if own == kind])
        for kind in sorted(set(types))
    }
    found["abstained"] = _mean([float(abstains(a)) for own in outcome.answers for a in own])
    found["operations"] = {
        op: {**own, "seconds_per_call": own["seconds"] / own["calls"] if own["calls"] else None}
        for op, own in outcome.stats.items()
    }
    found |= {
        "entries": _mean(outcome.entries), "memory_tokens": _mean(outcome.memory_tokens),
        "seconds": outcome.seconds,
    }  # fmt: skip
    return found


def extraction(outcome: Outcome, rows: Sequence[EpisodeRow]) -> list[list[ExtractScores]]:
    """Of each chunk of each row."""
    return [
        extract_scores(own, len(row.chunks), gold_facts(row))
        for row, own in zip(rows, outcome.turns, strict=True)
    ]


def answers_of(outcome: Outcome, rows: Sequence[EpisodeRow]) -> list[dict[str, float]]:
    """Marks of all questions in order, `judged` among them where there was a judge."""
    marks = [
        mark
        for row, own in zip(rows, outcome.answers, strict=True)
        for mark in answer_scores(row, own)
    ]
    if outcome.verdicts is not None:
        said = [verdict for own in outcome.verdicts for verdict in own]
        for mark, verdict in zip(marks, said, strict=True):
            mark["judged"] = float(verdict)
    return marks


def _updates(row: EpisodeRow, turns: Sequence[OpTurn]) -> list[Any]:
    gold = gold_facts(row) if row.gold else None
    keys = facts_by_chunk(row) if row.gold else []
    found = []
    for turn in turns:
        if gold is None:
            found.append(update_scores(turn))
            continue
        found.append(update_scores(turn, sorted(keys[turn.index]), gold[turn.index]))
    return found


def _pipelines(
    count: int, writer: Writer, tokenizer: Any, settings: Settings
) -> list[MemoryPipeline]:
    return [
        MemoryPipeline(writer, tokenizer, make_store("flat"), **vars(settings))
        for _ in range(count)
    ]


def _ask(pipelines: Sequence[MemoryPipeline], rows: Sequence[EpisodeRow]) -> list[list[str]]:
    return [
        pipeline.reflect([q.q for q in row.questions])
        for pipeline, row in zip(pipelines, rows, strict=True)
    ]


def _first_that_fits(row: EpisodeRow, writer: Writer) -> int:
    """The least chunk from which on all fit the context, together with any of the questions."""

    def room(question: str, chunks: Sequence[str]) -> float:
        found = writer.room(GENERATE, generate_messages(chunks, question))
        return float("inf") if found is None else found

    longest = min((q.q for q in row.questions), key=lambda question: room(question, ()))
    low, high = 0, len(row.chunks)
    while low < high:
        middle = (low + high) // 2
        if room(longest, row.chunks[middle:]) >= 0:
            high = middle
        else:
            low = middle + 1
    return low


def _stats(pipelines: Sequence[MemoryPipeline]) -> dict[str, dict[str, Any]]:
    found = {}
    for op in OPERATIONS:
        total = StageStats()
        for own in (pipeline.stats[op] for pipeline in pipelines):
            total.calls += own.calls
            total.errors += own.errors
            total.prompt_tokens += own.prompt_tokens
            total.new_tokens += own.new_tokens
            total.seconds += own.seconds
        if total.calls:
            found[op] = _plain(total)
    return found


def _plain(stats: StageStats) -> dict[str, Any]:
    # The ten most frequent errors: texts of a babbling model are as many as its calls.
    return {**vars(stats), "errors": dict(stats.errors.most_common(10))}


def _means(marks: Sequence[dict[str, float]]) -> dict[str, float | int | None]:
    names = [*METRICS, *(["judged"] if marks and "judged" in marks[0] else [])]
    return {"questions": len(marks), **{n: _mean([mark[n] for mark in marks]) for n in names}}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
