"""The Mem0-style memory pipeline (arXiv 2504.19413): extract facts, find related entries, update
the store, answer from it; each stage by its own expert (MemLoRA, 2512.04763) or by any one model.

Where it differs: search is the store's own (BM25 unless given another), the update writes changed
entries only and is carried out by the rules of every memory here (operations.py), and what a stage
wrote that cannot be read is counted, never raised.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mnemic.models.memory.op_prompts import (
    EXTRACT,
    GENERATE,
    OPERATIONS,
    UPDATE,
    Messages,
    extract_messages,
    generate_messages,
    parse_facts,
    update_messages,
)
from mnemic.models.memory.op_writer import ModelWriter, Reply, Writer
from mnemic.models.memory.operations import (
    Applied,
    CoreRewrite,
    Delete,
    Insert,
    Operation,
    Update,
    apply,
    validate,
)
from mnemic.models.memory.store import Change, Entry, Memory, OperationError
from mnemic.models.memory.syntax import Lines
from mnemic.models.memory.text import first_line, split_text
from mnemic.models.memory.turn import TurnResult

log = logging.getLogger("mnemic")


@dataclass
class StageStats:
    """Of one operation: calls of the model, errors by their text, its tokens, and wall seconds."""

    calls: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    new_tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Retained:
    """What became of one chunk: the model's texts, the facts read from the first, the entries shown
    beside them, and each operation of the second with what it changed. `chunk` is the part that was
    read, of the chunk at position `index` of those given.
    """

    chunk: str
    extracted: str
    facts: list[str]
    shown: list[Entry]
    updated: str
    applied: list[Applied]
    changes: list[Change]
    index: int = 0


@dataclass(frozen=True, slots=True)
class _Read:
    """A part of a chunk after extraction."""

    index: int
    chunk: str
    date: str | None
    extracted: str
    facts: list[str]


class MemoryPipeline:
    """`model`: an AdapterBank, a causal LM (the baseline: no adapter is chosen), or a `Writer`,
    whose `tokenizer` may be None. `k` old entries are found for each fact, `answer_k` for a
    question. `settings` are those of `ModelWriter`. `stats` counts by operation.

    Not for several threads at once.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        store: Memory,
        *,
        k: int = 5,
        answer_k: int = 10,
        chunk_tokens: int = 1024,
        **settings: Any,
    ) -> None:
        if min(k, answer_k, chunk_tokens) < 1:
            raise ValueError("k, answer_k and chunk_tokens must be at least 1")
        if not store.kinds:
            raise ValueError("the pipeline writes entries; a memory of kind text has none")
        writer = model if hasattr(model, "write") else ModelWriter(model, tokenizer, **settings)
        self.writer: Writer = writer
        self.store, self.k, self.answer_k = store, k, answer_k
        self.chunk_tokens, self.tokenizer = chunk_tokens, tokenizer
        self.stats = {operation: StageStats() for operation in OPERATIONS}
        past = [entry.changed for entry in store.history()]
        self._turn = max([*past, *(turn for _, turn in store.core_history())], default=-1) + 1

    @property
    def errors(self) -> dict[str, int]:
        """Errors of each operation: what could not be read, and calls that were refused."""
        return {op: sum(stats.errors.values()) for op, stats in self.stats.items()}

    def retain(
        self, chunks: Sequence[str], dates: Sequence[str | None] | None = None
    ) -> list[Retained]:
        """Keep what is worth keeping of `chunks`, said at `dates`; one result a chunk, more where
        one is too long for the model. All chunks are read in batches, since extraction knows no
        memory; the updates follow one by one, each on the memory that the one before left.
        """
        return retain_many([self], [chunks], [dates])[0]

    def recall(self, query: str, k: int | None = None) -> list[Entry]:
        """Entries that the store's search finds for `query`, best first. Runs no model."""
        return self.store.search(query, k or self.answer_k)

    def reflect(self, questions: Sequence[str]) -> list[str]:
        """A short answer to each from what is remembered, in batches."""
        prompts = []
        for question in questions:
            texts = [entry.text for entry in self.recall(question)]
            prompts.append(self._fit(
                GENERATE, texts, lambda kept, q=question: generate_messages(kept[::-1], q)
            )[1])  # fmt: skip
        replies = _write([self], GENERATE, [prompts])[0]
        answers = [first_line(reply.text) for reply in replies]
        for answer in answers:
            self._count(GENERATE, None if answer else "the answer is empty")
        return answers

    def _prepare(self, facts: list[str]) -> tuple[list[Entry], Messages] | None:
        """The entries beside the next chunk's facts, in the prompt's order, and the prompt; None
        where there is nothing to update by.
        """
        self.store.turn = self._turn
        self._turn += 1
        if not facts:
            return None
        found = related(self.store, facts, self.k)
        shown, prompt = self._fit(
            UPDATE, found, lambda kept: update_messages([e.text for e in by_id(kept)], facts)
        )
        return by_id(shown), prompt

    def _finish(self, read: _Read, shown: list[Entry], reply: Reply) -> Retained:
        """Carry out the reply to what `_prepare` made for the same chunk."""
        result = apply_update(self.store, reply.text, shown, time=read.date, cut=reply.cut)
        for error in result.errors:
            self._count(UPDATE, error)
        return Retained(
            read.chunk, read.extracted, read.facts, shown, reply.text, result.applied,
            result.changes, read.index,
        )  # fmt: skip

    def _count(self, operation: str, error: str | None) -> None:
        if error is not None:
            self.stats[operation].errors[error] += 1
            log.debug("%s: %s", operation, error)

    def _fit(
        self, operation: str, items: list[Any], build: Callable[[list[Any]], Messages]
    ) -> tuple[list[Any], Messages]:
        """As many of `items`, the best first, as the model's context holds."""
        for count in range(len(items), -1, -1):
            prompt = build(items[:count])
            room = self.writer.room(operation, prompt)
            if room is None or room >= 0:
                return items[:count], prompt
        self._count(operation, "the prompt is longer than the model's context")
        return [], prompt

    def _parts(self, chunk: str, date: str | None) -> list[str]:
        room = self.writer.room(EXTRACT, extract_messages("", date))
        # 8: tokens at the seams may differ from those of the parts.
        limit = self.chunk_tokens if room is None else min(self.chunk_tokens, room - 8)
        return split_text(chunk, max(1, limit), self._tokens)

    def _tokens(self, text: str) -> int:
        if self.tokenizer is None:
            return self.store.count(text)
        return len(self.tokenizer(text, add_special_tokens=False).input_ids)


def retain_many(
    pipelines: Sequence[MemoryPipeline],
    chunks: Sequence[Sequence[str]],
    dates: Sequence[Sequence[str | None] | None] | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[Retained]]:
    """What `retain` gives for each pipeline and its stream of chunks, the streams side by side:
    extraction in one go over all of them, then the next update of every stream as one batch.
    `progress` is called with (rounds of updates done, all rounds).

    Raises:
        ValueError: the pipelines have several writers, or one memory.
    """
    if len({id(p.writer) for p in pipelines}) > 1:
        raise ValueError("streams side by side need one writer: give it to all pipelines")
    if len({id(p.store) for p in pipelines}) < len(pipelines):
        raise ValueError("two streams write one memory; give each pipeline its own store")
    dates = [None] * len(chunks) if dates is None else dates
    parts = [
        [
            (index, part, date)
            for index, (chunk, date) in enumerate(zip(own, said or [None] * len(own), strict=True))
            for part in pipeline._parts(chunk, date)
        ]
        for pipeline, own, said in zip(pipelines, chunks, dates, strict=True)
    ]
    prompts = [[extract_messages(part, date) for _, part, date in own] for own in parts]
    read: list[list[_Read]] = []
    for pipeline, own, replies in zip(
        pipelines, parts, _write(pipelines, EXTRACT, prompts), strict=True
    ):
        read.append([])
        for (index, part, date), reply in zip(own, replies, strict=True):
            facts, error = parse_facts(reply.text)
            pipeline._count(EXTRACT, error if error is None or not reply.cut else "cut off")
            read[-1].append(_Read(index, part, date, reply.text, facts))
    found: list[list[Retained]] = [[] for _ in pipelines]
    rounds = max(map(len, read), default=0)
    for turn in range(rounds):
        ready = [
            pipeline._prepare(own[turn].facts) if turn < len(own) else None
            for pipeline, own in zip(pipelines, read, strict=True)
        ]
        asked = [[one[1]] if one else [] for one in ready]
        replies = _write(pipelines, UPDATE, asked)
        for i, one in enumerate(ready):
            if one:
                found[i].append(pipelines[i]._finish(read[i][turn], one[0], replies[i][0]))
            elif turn < len(read[i]):
                empty = read[i][turn]
                found[i].append(
                    Retained(empty.chunk, empty.extracted, [], [], "", [], [], empty.index)
                )
        if progress is not None:
            progress(turn + 1, rounds)
    return found


def _write(
    pipelines: Sequence[MemoryPipeline], operation: str, prompts: Sequence[list[Messages]]
) -> list[list[Reply]]:
    """The replies to each pipeline's prompts, written as one list by their common writer. Each
    pipeline is charged its share of the seconds, by its number of calls.
    """
    flat = [prompt for own in prompts for prompt in own]
    if not flat:
        return [[] for _ in prompts]
    start = time.perf_counter()
    replies = iter(pipelines[0].writer.write(operation, flat))
    seconds = time.perf_counter() - start
    found = [[next(replies) for _ in own] for own in prompts]
    for pipeline, own in zip(pipelines, found, strict=True):
        stats = pipeline.stats[operation]
        stats.calls += len(own)
        stats.seconds += seconds * len(own) / len(flat)
        stats.prompt_tokens += sum(reply.prompt_tokens for reply in own)
        stats.new_tokens += sum(reply.new_tokens for reply in own)
    return found


def related(store: Memory, facts: Sequence[str], k: int) -> list[Entry]:
    """The `k` best entries for each fact, each entry once: best ones of all facts first."""
    ranked = [store.search(fact, k) for fact in facts]
    found: dict[str, Entry] = {}
    for rank in range(k):
        for entries in ranked:
            if rank < len(entries):
                found.setdefault(entries[rank].id, entries[rank])
    return list(found.values())


def by_id(entries: Sequence[Entry]) -> list[Entry]:
    """In the order they came: that of `update_messages`, in training and in use."""
    return sorted(entries, key=lambda entry: int(entry.id[1:]))


def apply_update(
    store: Memory, text: str, shown: Sequence[Entry], *, time: str | None = None, cut: bool = False
) -> TurnResult:
    """Carry out what a model answered to `update_messages` over the texts of `shown`: m0 is
    `shown[0]`, other ids are refused. What it inserts without a time gets `time`. One call that
    fails changes nothing and stops nothing; entries that are not named stay as they are.
    """
    before = store.snapshot()
    visible = frozenset(entry.id for entry in shown)
    calls = Lines().parse(text, cut=cut) or [
        Applied(None, None, "no operation in the answer", text[:200])
    ]
    applied = []
    for call in calls:
        if call.operation is not None:
            try:
                operation = _expand(call.operation, shown, time)
                id = apply(store, operation, visible=visible)
                call = Applied(operation, id, None, call.raw)
            except OperationError as error:
                call = Applied(call.operation, None, str(error), call.raw)
        applied.append(call)
    return TurnResult(applied, store.diff(before))


def _expand(operation: Operation, shown: Sequence[Entry], time: str | None) -> Operation:
    if isinstance(operation, CoreRewrite):
        raise OperationError("the update of entries leaves the core text alone")
    if isinstance(operation, Insert) and time and operation.time is None:
        time = " ".join(time.split())[:64]
        return validate("insert", {**operation.model_dump(exclude={"name"}), "time": time})
    if isinstance(operation, Update | Delete):
        number = int(operation.id[1:])
        if number >= len(shown):
            raise OperationError(f"there is no {operation.id!r} in view")
        return operation.model_copy(update={"id": shown[number].id})
    return operation
