"""What a memory manager is measured against: memories made without a model, read by the same
answerer.

    empty        nothing is remembered
    insert-all   each line of each chunk is an entry, as it stands; one that is there already is not
                 written again
    bm25         chunks are entries, and a question is answered from the `TOP_K` it finds
    full         the whole stream is the reader's context
    oracle       the gold operations, by a teacher without weaknesses that sees what a manager sees;
                 where they are not known, the chunks that hold each question's answer

The rule reader reads entries and finds nothing in a chunk of many facts, so it is given the lines
of chunks as entries; then `full` would be `insert-all` again and is left out.
"""

import copy
import random
from collections.abc import Callable, Sequence
from typing import Any

from mnemic.models.memory.answer import Answerer, Ask
from mnemic.models.memory.episode import MemoryConfig, MemoryEpisode
from mnemic.models.memory.rule_reader import RuleReader
from mnemic.models.memory.store import Memory
from mnemic.models.memory.stores import make_store
from mnemic.train.data.memory.episode import EpisodeRow, Question
from mnemic.train.data.memory.teacher import Weaknesses, net, teach
from mnemic.train.rollout.suite import Reading

BASELINES = ("empty", "insert-all", "bm25", "full", "oracle")
TOP_K = 2
"""Chunks that `bm25` shows with a question: the RAG-Top2 of Mem-alpha (arXiv 2509.25911)."""


def read_baseline(
    name: str, rows: Sequence[EpisodeRow], config: MemoryConfig, answerer: Answerer
) -> tuple[list[Reading], list[str]]:
    """The readings of a baseline and notes for whoever looks at them; no readings where it does not
    apply. `config`: the manager's, for the teacher.

    Raises:
        ValueError: no such baseline.
    """
    if name not in BASELINES:
        raise ValueError(f"a baseline is one of {', '.join(BASELINES)}, got {name!r}")
    by_rule = isinstance(answerer, RuleReader)
    notes: list[str] = []
    if name == "full":
        if by_rule:
            return [], ["full: to the rule reader the lines of the stream are insert-all's entries"]
        notes = _too_long(rows, answerer)
        answerer = with_room(answerer)
    if name == "oracle":
        return _oracle(rows, config, answerer, by_rule)
    make = {"empty": _empty, "insert-all": _insert_all, "bm25": _bm25, "full": _full}[name]
    return _ask(rows, [make(row, by_rule) for row in rows], answerer), notes


# A row's memory as it is kept, and what of it a question is asked of.
_Kept = tuple[Memory, Callable[[Question], Memory]]


def memory_of(texts: Sequence[str]) -> Memory:
    """A memory with these entries as they are, line breaks and any length included."""
    memory = make_store("flat")
    entries = [
        {"id": f"m{i}", "kind": "fact", "content": text, "turn": i, "changed": i, "previous": []}
        for i, text in enumerate(texts)
    ]
    # Not `insert`: that makes one line of each, and refuses long ones.
    memory.restore({"core": "", "turn": len(texts), "next": len(texts), "entries": entries})
    return memory


def with_room(answerer: Answerer) -> Answerer:
    """The same reader without its bound on the memory it is shown; its context stays one."""
    wide: Any = copy.copy(answerer)
    if hasattr(wide, "max_memory_tokens"):
        wide.max_memory_tokens = 1 << 30
    return wide


def _lines(chunks: Sequence[str]) -> list[str]:
    lines = [line.strip() for chunk in chunks for line in chunk.splitlines()]
    return list(dict.fromkeys(line for line in lines if line))


def _texts(chunks: Sequence[str], by_rule: bool) -> list[str]:
    return _lines(chunks) if by_rule else list(chunks)


def _empty(row: EpisodeRow, by_rule: bool) -> _Kept:
    memory = memory_of([])
    return memory, lambda question: memory


def _insert_all(row: EpisodeRow, by_rule: bool) -> _Kept:
    memory = memory_of(_lines(row.chunks))
    return memory, lambda question: memory


def _full(row: EpisodeRow, by_rule: bool) -> _Kept:
    memory = memory_of(row.chunks)
    return memory, lambda question: memory


def _bm25(row: EpisodeRow, by_rule: bool) -> _Kept:
    memory = memory_of(row.chunks)

    def found(question: Question) -> Memory:
        best = sorted(memory.search(question.q, TOP_K), key=lambda entry: entry.turn)
        return memory_of(_texts([entry.content for entry in best], by_rule))

    return memory, found


def _evidence(row: EpisodeRow, by_rule: bool) -> _Kept:
    # Of a question without evidence nothing is known, or nothing can be.
    needed = sorted({i for question in row.questions for i in question.evidence})
    return memory_of([row.chunks[i] for i in needed]), lambda question: memory_of(
        _texts([row.chunks[i] for i in question.evidence], by_rule)
    )


def _ask(rows: Sequence[EpisodeRow], kept: Sequence[_Kept], answerer: Answerer) -> list[Reading]:
    asks = [
        Ask(question.q, pick(question))
        for row, (_, pick) in zip(rows, kept, strict=True)
        for question in row.questions
    ]
    answers = iter(answerer.answer(asks))
    return [
        Reading(
            row, [next(answers) for _ in row.questions], memory.tokens(),
            sum(memory.count(chunk) for chunk in row.chunks), len(memory.entries()),
        )
        for row, (memory, _) in zip(rows, kept, strict=True)
    ]  # fmt: skip


def _oracle(
    rows: Sequence[EpisodeRow], config: MemoryConfig, answerer: Answerer, by_rule: bool
) -> tuple[list[Reading], list[str]]:
    if all(row.gold for row in rows):
        episodes = [taught(row, config) for row in rows]
        answers = iter(answerer.answer([ask for episode in episodes for ask in episode.asks()]))
        return [
            Reading(
                row, [next(answers) for _ in row.questions], episode.store.tokens(),
                episode.stream_tokens(), len(episode.store.entries()), episode.turns,
            )
            for row, episode in zip(rows, episodes, strict=True)
        ], []  # fmt: skip
    if not any(question.evidence for row in rows for question in row.questions):
        return [], ["oracle: neither operations nor evidence are known here"]
    note = "oracle: operations are not known here; the chunks with the answers take their place"
    return _ask(rows, [_evidence(row, by_rule) for row in rows], answerer), [note]


def taught(row: EpisodeRow, config: MemoryConfig) -> MemoryEpisode:
    """The row read by the teacher without weaknesses."""
    if config.store == "text":
        # Gold operations are on entries; a memory that has none is read as a flat one.
        config = MemoryConfig(**{**vars(config), "store": "flat"})
    episode = MemoryEpisode(row.chunks, [question.q for question in row.questions], config)
    for wanted in net(row.gold):
        episode.step(oracle_text(episode, wanted))
    return episode


def oracle_text(episode: MemoryEpisode, wanted: dict[str, str | None]) -> str:
    """What the teacher writes for the next chunk of `episode`, whose gold steps come to `wanted`
    (of `net`: the teacher itself looks only at what is held before the chunk).
    """
    steps = [
        {"op": "delete", "key": key}
        if content is None
        else {"op": "update", "key": key, "content": content}
        for key, content in wanted.items()
    ]
    return episode.syntax.write(teach(episode, steps, Weaknesses(), random.Random(0)))


def _too_long(rows: Sequence[EpisodeRow], answerer: Any) -> list[str]:
    context = getattr(
        getattr(getattr(answerer, "model", None), "config", None), "max_position_embeddings", None
    )
    if context is None:
        return []
    room = context - answerer.max_new_tokens
    long = sum(len(answerer.tokenizer("\n".join(row.chunks)).input_ids) > room for row in rows)
    if not long:
        return []
    return [
        f"full: {long} of {len(rows)} streams exceed the reader's context of {context} tokens; of "
        f"these it is shown the {answerer.k} chunks that a question finds"
    ]
