"""An episode as the pipeline lives through it (models/memory/pipeline.py): facts out of each chunk,
updates one after the other on the memory that the ones before left, then the questions.

The prompts are the pipeline's, so an expert learns from what it will be shown. A replay is a
function of the episode and the teacher's replies: with the replies of an earlier start it comes to
the same questions, and goes on behind them. What cannot be read changes nothing, as there.
"""

from collections.abc import Callable, Sequence
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
from mnemic.models.memory.pipeline import apply_update, by_id, related
from mnemic.models.memory.store import Entry, Memory
from mnemic.models.memory.stores import make_store
from mnemic.train.data.memory.episode import EpisodeRow
from mnemic.train.data.memory.reading import dated
from mnemic.train.distill.gold import Gold
from mnemic.train.distill.teachers import Answer, Ask

K, ANSWER_K = 5, 10
"""Entries found for a fact and for a question: the pipeline's own numbers."""

Asking = Callable[[str, Sequence[Ask]], list[Answer]]
Room = Callable[[str, Messages], int | None]


def needed(operations: Sequence[str]) -> list[str]:
    """The operations, and those whose replies they are made from: all before the last one."""
    return list(OPERATIONS[: max(OPERATIONS.index(op) for op in operations) + 1])


def play(
    row: EpisodeRow, ask: Asking, room: Room, gold: Gold | None, operations: Sequence[str]
) -> Memory:
    """Ask all that the episode asks of `operations` (those of `needed`); `gold`: the teacher is
    gold. Returns the memory at its end.
    """
    store = make_store("flat")
    base = f"{row.source}/{row.id}"
    chunks = [dated(chunk) for chunk in row.chunks]
    asks = [
        Ask(
            f"{base}/{EXTRACT}/{n:04}", EXTRACT, extract_messages(text, date),
            {"chunk": text, "date": date}, gold.extract(n) if gold else None,
        )
        for n, (date, text) in enumerate(chunks)
    ]  # fmt: skip
    found = [parse_facts(answer.reply)[0] for answer in ask(EXTRACT, asks)]
    if UPDATE not in operations:
        return store
    for n, ((date, _), facts) in enumerate(zip(chunks, found, strict=True)):
        store.turn = n
        if facts:
            _update(f"{base}/{UPDATE}/{n:04}", n, store, facts, date, ask, room, gold)
    if GENERATE in operations:
        ask(GENERATE, _questions(row, base, store, room, gold))
    return store


def _update(
    key: str, n: int, store: Memory, facts: list[str], date: str | None, ask: Asking, room: Room,
    gold: Gold | None,
) -> None:  # fmt: skip
    def prompt(kept: Sequence[Entry]) -> Messages:
        return update_messages([entry.text for entry in by_id(kept)], facts)

    shown = by_id(_fitting(UPDATE, related(store, facts, K), prompt, room))
    context: dict[str, Any] = {"facts": facts, "shown": [entry.text for entry in shown]}
    target = gold.update(n, facts, shown) if gold else None
    (answer,) = ask(UPDATE, [Ask(key, UPDATE, prompt(shown), context, target)])
    if answer.error is not None:
        return
    if gold:
        gold.apply(n, store, answer.reply, shown, date)
    else:
        apply_update(store, answer.reply, shown, time=date, cut=answer.cut)


def _questions(
    row: EpisodeRow, base: str, store: Memory, room: Room, gold: Gold | None
) -> list[Ask]:
    asks = []
    for n, question in enumerate(row.questions):
        if gold and not gold.asks(question):
            continue

        def prompt(kept: Sequence[Entry], q: str = question.q) -> Messages:
            return generate_messages([entry.text for entry in kept[::-1]], q)

        best = _fitting(GENERATE, store.search(question.q, ANSWER_K), prompt, room)
        context: dict[str, Any] = {
            "question": question.q, "type": question.type, "golds": list(question.answers),
            "memories": [entry.text for entry in best[::-1]],
            "evidence": [f for i in question.evidence if row.facts for f in row.facts[i]],
        }  # fmt: skip
        target = gold.answer(question, best[::-1]) if gold else None
        asks.append(Ask(f"{base}/{GENERATE}/{n:04}", GENERATE, prompt(best), context, target))
    return asks


def _fitting(
    operation: str, found: list[Entry], prompt: Callable[[Sequence[Entry]], Messages], room: Room
) -> list[Entry]:
    """As many of the best as the teacher's context holds."""
    for count in range(len(found), 0, -1):
        left = room(operation, prompt(found[:count]))
        if left is None or left >= 0:
            return found[:count]
    return []
