"""Gold rows of the three memory operations from generated streams: what each expert should write.

Extraction is a function of the chunk alone: for each thing it speaks of, where it leaves it, as
`Anna city rome`, or `Anna city none` where it ended. The update sees what the pipeline would show
(the same search, the same order) and writes the changed entries only. Answers come from what is
retrieved: `none` where that does not tell. Prompts and targets are those of op_prompts.py.
"""

import json
import random
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

from mnemic.models.memory.bm25 import words
from mnemic.models.memory.op_prompts import (
    EXTRACT,
    GENERATE,
    OPERATIONS,
    UPDATE,
    extract_messages,
    generate_messages,
    update_messages,
    write_facts,
)
from mnemic.models.memory.operations import Delete, Insert, Noop, Update
from mnemic.models.memory.operations import Operation as Call
from mnemic.models.memory.pipeline import apply_update, by_id, related
from mnemic.models.memory.store import Entry
from mnemic.models.memory.stores import make_store
from mnemic.models.memory.syntax import Lines
from mnemic.train.data.memory.episode import EpisodeRow
from mnemic.train.data.memory.kvstream import KvStream, Split, episode

STREAM = KvStream(
    n_chunks=6, n_attributes=6, n_values=20, p_update=0.3, p_delete=0.15, p_repeat=0.1,
    style="wide",
)  # fmt: skip
GONE = "none"
ASKED = ("current", "updated", "abstain")
"""Question types that entries can answer; the others ask for what an update overwrote."""


def operation_rows(
    row: EpisodeRow, op: str, seed: int = 0, *, k: int = 5, answer_k: int = 10, vary: bool = True
) -> Iterator[dict[str, Any]]:
    """Rows of one operation, a chunk or a question each: `prompt` and `completion` as messages, and
    `operation`. `row.gold` must be there. `vary`: of half of `k` (for a fact) and `answer_k` (for a
    question) to all of it is searched for, so that views of all sizes occur; else all of it, as the
    pipeline does. Update and answer rows come from a memory that is right so far.
    """
    if op not in OPERATIONS:
        raise ValueError(f"an operation is one of {', '.join(OPERATIONS)}, got {op!r}")
    if len(row.gold) != len(row.chunks):
        raise ValueError(f"{row.id}: has no gold operations, and rows of {op} are made from them")
    draw = random.Random(f"operations {op} {seed} {row.id}")
    store = make_store("flat")

    def size(most: int) -> int:
        return draw.randint((most + 1) // 2, most) if vary else most

    for turn, (chunk, facts) in enumerate(zip(row.chunks, facts_by_chunk(row), strict=True)):
        if op == EXTRACT:
            yield _row(op, extract_messages(chunk), write_facts(list(facts.values())))
        if not facts:
            continue
        if op == UPDATE:
            shown = by_id(related(store, list(facts.values()), size(k)))
            prompt = update_messages([entry.text for entry in shown], list(facts.values()))
            yield _row(op, prompt, update_target(facts, shown))
        store.turn = turn
        # By all entries: one that the search missed must not stay in a memory that is right.
        entries = store.entries()
        result = apply_update(store, update_target(facts, entries), entries)
        assert not result.errors, (row.id, result.errors)
    if op == GENERATE:
        for question in row.questions:
            if question.type in ASKED:
                memories = store.search(question.q, size(answer_k))[::-1]
                prompt = generate_messages([entry.text for entry in memories], question.q)
                yield _row(op, prompt, answer_of(question.q, question.answers[0], memories))


def split_rows(
    op: str, split: Split, size: int, *, stream: KvStream = STREAM, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """`size` rows of one operation from the episodes of a split, each prompt once. The splits share
    no name, value or template, so none of the prompts either.

    Raises:
        ValueError: the stream is `plain`, or has too few different prompts.
    """
    if stream.style == "plain":
        raise ValueError("style 'plain': only natural and wide streams have a held-out split")
    seen: set[str] = set()
    last = 0
    for index in count():
        for row in operation_rows(episode(stream, split, index, seed), op, seed):
            key = json.dumps(row["prompt"])
            if key in seen:
                continue
            if len(seen) == size:
                return
            seen.add(key)
            last = index
            yield row
        if len(seen) == size:
            return
        if index - last > 50:
            raise ValueError(
                f"only {len(seen)} different prompts of {op} in the {split} split, wanted {size}; "
                "give the stream more entities, values or events"
            )


def mixed_rows(
    ops: Sequence[str], split: Split, size: int, *, stream: KvStream = STREAM, seed: int = 0
) -> list[dict[str, Any]]:
    """`size` rows of each operation, one of each in turn; errors as `split_rows`."""
    made = [split_rows(op, split, size, stream=stream, seed=seed) for op in ops]
    return [row for several in zip(*made, strict=True) for row in several]


def facts_by_chunk(row: EpisodeRow) -> list[dict[str, str]]:
    """What each chunk says, by key, as it leaves it, in the order of last mention: `Anna city
    rome`, the name written as it is in the text.
    """
    held: dict[str, str] = {}
    found = []
    for chunk, steps in zip(row.chunks, row.gold, strict=True):
        facts: dict[str, str] = {}
        for step in steps:
            kind, key = step["op"], _as_said(step.get("key", ""), chunk)
            if kind == "noise":
                continue
            if kind == "delete":
                held.pop(key, None)
            elif kind != "repeat":
                held[key] = f"{key}{step['content'][len(key) :]}"
            facts.pop(key, None)
            facts[key] = held.get(key, f"{key} {GONE}")
        found.append(facts)
    return found


def _as_said(key: str, chunk: str) -> str:
    """To write a name otherwise than it stands there is to spell it, which is another skill."""
    name = key.split(" ")[0]
    return key.replace(name, name.capitalize(), 1) if name.capitalize() in chunk else key


def update_target(facts: dict[str, str], shown: Sequence[Entry]) -> str:
    """The lines that bring `shown` (numbered m0, m1, ...) up to date."""
    calls: list[Call] = []
    for key, content in facts.items():
        mine = {f"m{n}": e.content for n, e in enumerate(shown) if e.content.startswith(f"{key} ")}
        if content == f"{key} {GONE}":
            calls += [Delete(id=id) for id in mine]
        elif not mine:
            calls.append(Insert(content=content))
        elif content not in mine.values():
            calls.append(Update(id=next(iter(mine)), content=content))
    return Lines().write(calls or [Noop()])


def answer_of(question: str, gold: str, memories: Sequence[Entry]) -> str:
    """`gold` where a memory says it of what is asked for."""
    asked = set(words(question))
    for entry in memories:
        key = entry.content.removesuffix(f" {gold}")
        if key != entry.content and set(words(key)) <= asked:
            return gold
    return GONE


def _row(op: str, prompt: list[dict[str, str]], target: str) -> dict[str, Any]:
    completion = [{"role": "assistant", "content": target}]
    return {"prompt": prompt, "completion": completion, "operation": op}
