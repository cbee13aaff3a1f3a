"""How well each memory operation was done: pure functions over recorded turns and answers.

The measures follow HaluMem's names (extraction, update and answers judged apart; fabrication and
omission), its judge replaced by words. Two facts are compared by the F1 of their content words
(stop words aside, long words by their first letters); from `SAME` they say the same. That is
blind to a paraphrase in other words, which counts as a miss, and to a negation, which does not.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mnemic.models.memory.bm25 import words
from mnemic.models.memory.metrics import exact_match, f1, meteor, normalize, rouge_l, score
from mnemic.models.memory.op_prompts import parse_facts
from mnemic.models.memory.pipeline import Retained
from mnemic.train.data.memory.episode import EpisodeRow
from mnemic.train.distill.support import content_words

SAME = 0.5
"""Word F1 from which an extracted fact is a gold one."""
BORNE_OUT = 0.75
"""Share of a text's content words that its sources must hold, or it is made up."""


@dataclass(frozen=True, slots=True)
class Call:
    """A line of an update: `name` is None if it could not be read; `id` is the store's."""

    name: str | None
    id: str | None
    content: str | None
    error: str | None


@dataclass(frozen=True, slots=True)
class OpTurn:
    """What was written for a chunk (or a part of one, where it is too long), as plain values for
    JSON. `shown`: (id, content) of the entries beside the facts.
    """

    index: int
    chunk: str
    date: str | None
    extracted: str
    facts: list[str]
    shown: list[tuple[str, str]]
    updated: str
    calls: list[Call] = field(default_factory=list)


def record(one: Retained, date: str | None = None) -> OpTurn:
    """A turn of the pipeline, its ids those of the store even in calls that were refused."""
    shown = [(entry.id, entry.content) for entry in one.shown]
    calls = []
    for applied in one.applied:
        made: Any = applied.operation
        id = applied.id
        named = getattr(made, "id", None)
        if named is not None and id is None:
            # A refused call keeps the prompt's number.
            number = int(named[1:])
            id = shown[number][0] if number < len(shown) else None
        content = getattr(made, "content", None)
        calls.append(Call(made.name if made else None, id, content, applied.error))
    return OpTurn(
        one.index, one.chunk, date, one.extracted, one.facts, shown, one.updated, calls
    )  # fmt: skip


def from_json(raw: dict[str, Any]) -> OpTurn:
    calls = [Call(**call) for call in raw["calls"]]
    return OpTurn(**{**raw, "shown": [(i, c) for i, c in raw["shown"]], "calls": calls})


def same(left: str, right: str) -> float:
    """F1 of the content words that two facts share, 0 to 1."""
    a, b = content_words(left), content_words(right)
    return 2 * len(a & b) / (len(a) + len(b)) if a and b else 0.0


def borne_out(text: str, known: set[str]) -> bool:
    """Whether at least `BORNE_OUT` of the text's content words are in `known` (content words)."""
    own = content_words(text)
    return len(own & known) >= BORNE_OUT * len(own)


def matched(facts: Sequence[str], gold: Sequence[str]) -> int:
    """Pairs of a greedy one-to-one matching, the most alike first, down to `SAME`."""
    pairs = sorted(
        ((same(f, g), i, j) for i, f in enumerate(facts) for j, g in enumerate(gold)),
        key=lambda pair: (-pair[0], pair[1], pair[2]),
    )
    left: set[int] = set()
    right: set[int] = set()
    for value, i, j in pairs:
        if value >= SAME and i not in left and j not in right:
            left.add(i)
            right.add(j)
    return len(left)


@dataclass
class ExtractScores:
    """Counts over chunks. `said` facts were extracted, `gold` are known, `matched` of both say the
    same, `exact` are equal in normal form; soft sums are of the best F1 of each fact with the other
    side. `fabricated`: borne out neither by the chunk nor by a gold fact.
    """

    replies: int = 0
    valid: int = 0
    said: int = 0
    fabricated: int = 0
    judged: int = 0
    gold: int = 0
    matched: int = 0
    exact: int = 0
    soft_said: float = 0.0
    soft_gold: float = 0.0

    def __add__(self, other: "ExtractScores") -> "ExtractScores":
        mine, theirs = vars(self), vars(other)
        return ExtractScores(**{name: mine[name] + theirs[name] for name in mine})


def extract_scores(
    turns: Sequence[OpTurn], chunks: int, gold: Sequence[Sequence[str]] | None
) -> list[ExtractScores]:
    """One for each of a stream's `chunks`, parts of one chunk taken together. `gold`: facts by
    chunk, None where the data does not know them; `judged` counts the facts that it knows about.
    """
    found = []
    for index in range(chunks):
        own = [turn for turn in turns if turn.index == index]
        facts = list({normalize(f): f for turn in own for f in turn.facts}.values())
        wanted = list(gold[index]) if gold is not None else []
        known = {word for turn in own for word in content_words(f"{turn.date or ''} {turn.chunk}")}
        one = ExtractScores(
            replies=len(own),
            valid=sum(parse_facts(turn.extracted)[1] is None for turn in own),
            said=len(facts),
            fabricated=sum(
                not borne_out(fact, known) and _best(fact, wanted) < SAME for fact in facts
            ),
        )
        if gold is not None:
            one.judged, one.gold = len(facts), len(wanted)
            one.matched = matched(facts, wanted)
            one.exact = len({normalize(f) for f in facts} & {normalize(g) for g in wanted})
            one.soft_said = sum(_best(fact, wanted) for fact in facts)
            one.soft_gold = sum(_best(fact, facts) for fact in wanted)
        found.append(one)
    return found


def extract_figures(scores: Sequence[ExtractScores]) -> dict[str, float | None]:
    """Rates 0 to 1 over all chunks, None where nothing is known. `omission` is 1 - recall."""
    total = sum(scores, ExtractScores())
    precision, recall = _rate(total.matched, total.judged), _rate(total.matched, total.gold)
    soft_p, soft_r = _rate(total.soft_said, total.judged), _rate(total.soft_gold, total.gold)
    return {
        "json_valid": _rate(total.valid, total.replies),
        "facts_per_chunk": _rate(total.said, len(scores)),
        "precision": precision,
        "recall": recall,
        "f1": _rate(2 * total.matched, total.judged + total.gold),
        "soft_f1": None if soft_r is None else _harmonic(soft_p or 0.0, soft_r),
        "exact_f1": _rate(2 * total.exact, total.judged + total.gold),
        "fabrication": _rate(total.fabricated, total.said),
        "omission": None if recall is None else 1 - recall,
    }


@dataclass
class UpdateScores:
    """Counts over turns. `calls` that were `readable`, and those of them `refused`; `written` texts
    and `fabricated` ones; `given` facts and `omitted` ones. Where gold is known: `gold` facts whose
    operation is, `op_right` ones, `with_id` that change an entry, `id_right` ones, `all_right`.
    """

    turns: int = 0
    calls: int = 0
    readable: int = 0
    refused: int = 0
    insert: int = 0
    update: int = 0
    delete: int = 0
    noop: int = 0
    written: int = 0
    fabricated: int = 0
    given: int = 0
    omitted: int = 0
    gold: int = 0
    op_right: int = 0
    with_id: int = 0
    id_right: int = 0
    all_right: int = 0

    def __add__(self, other: "UpdateScores") -> "UpdateScores":
        mine, theirs = vars(self), vars(other)
        return UpdateScores(**{name: mine[name] + theirs[name] for name in mine})


def update_scores(turn: OpTurn, keys: Sequence[str] = (), gold: Sequence[str] = ()) -> UpdateScores:
    """Of one turn. `keys` and `gold`: what a generated stream's chunk is about and its gold facts
    (`KEY VALUE`, or `KEY none` where it ended): a given fact that is one of them has a known right
    operation on the shown entries.

    A text is fabricated that the given facts and the shown entries together do not bear out. A fact
    is omitted if no entry, shown or written, holds it after the turn; one that says an end has no
    entry to be in and is left out.
    """
    found = UpdateScores()
    if not turn.facts:
        return found
    found.turns, found.calls = 1, len(turn.calls)
    known = {w for text in (*turn.facts, *(c for _, c in turn.shown)) for w in content_words(text)}
    after = dict(turn.shown)
    fresh: list[str] = []
    for call in turn.calls:
        if call.name is None:
            continue
        found.readable += 1
        if call.name in ("insert", "update", "delete", "noop"):
            setattr(found, call.name, getattr(found, call.name) + 1)
        if call.error is not None:
            found.refused += 1
        elif call.name == "delete":
            after.pop(call.id or "", None)
        elif call.name in ("insert", "update") and call.content is not None:
            found.written += 1
            found.fabricated += not borne_out(call.content, known)
            if call.name == "update" and call.id in after:
                after[call.id] = call.content
            else:
                fresh.append(call.content)
    entries = [*after.values(), *fresh]
    golds = {normalize(fact) for fact in gold}
    for fact in turn.facts:
        key = next((k for k in keys if normalize(fact).startswith(f"{normalize(k)} ")), None)
        wanted = _wanted(key, fact, turn) if key and normalize(fact) in golds else None
        if wanted is not None and key is not None:
            found += _against(key, wanted, turn)
        if not fact.endswith(" none"):
            found.given += 1
            found.omitted += not any(_holds(entry, fact) for entry in entries)
    return found


def update_figures(scores: Sequence[UpdateScores]) -> dict[str, float | None]:
    """Rates 0 to 1 over all turns, None where nothing is known."""
    total = sum(scores, UpdateScores())
    mix = {
        f"share_{name}": _rate(getattr(total, name), total.readable)
        for name in ("insert", "update", "delete", "noop")
    }
    return {
        "readable": _rate(total.readable, total.calls),
        "refused": _rate(total.refused, total.readable),
        **mix,
        "operation_accuracy": _rate(total.op_right, total.gold),
        "id_accuracy": _rate(total.id_right, total.with_id),
        "all_right": _rate(total.all_right, total.gold),
        "fabrication": _rate(total.fabricated, total.written),
        "omission": _rate(total.omitted, total.given),
    }


def answer_scores(row: EpisodeRow, answers: Sequence[str]) -> list[dict[str, float]]:
    """Of each question: `score` by the data's metric, and the metrics that all data share."""
    return [
        {
            "score": score(row.metric, answer, q.answers, q.type),
            "f1": f1(answer, q.answers),
            "rouge_l": rouge_l(answer, q.answers),
            "meteor": meteor(answer, q.answers),
            "em": exact_match(answer, q.answers),
        }
        for q, answer in zip(row.questions, answers, strict=True)
    ]


def _harmonic(left: float, right: float) -> float:
    return 2 * left * right / (left + right) if left + right else 0.0


def _rate(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def _best(fact: str, others: Sequence[str]) -> float:
    return max((same(fact, other) for other in others), default=0.0)


def _holds(entry: str, fact: str) -> bool:
    # An entry may say more than the fact: its words count only against the F1.
    return same(entry, fact) >= SAME or borne_out(fact, content_words(entry))


def _wanted(key: str, fact: str, turn: OpTurn) -> tuple[str, list[str], str]:
    """(operation, ids that it may name, content) that a fact calls for."""
    mine = {id: content for id, content in turn.shown if content.startswith(f"{key} ")}
    if fact.endswith(" none"):
        return ("delete" if mine else "noop"), list(mine), ""
    if not mine:
        return "insert", [], fact
    if any(normalize(content) == normalize(fact) for content in mine.values()):
        return "noop", [], ""
    return "update", list(mine), fact


def _against(key: str, wanted: tuple[str, list[str], str], turn: OpTurn) -> UpdateScores:
    """The calls on a key against what it wants; several must all be right."""
    name, ids, content = wanted
    shown, own = dict(turn.shown), set(words(key))
    about = [
        call for call in turn.calls
        if own <= set(words(call.content or ""))
        or (call.id is not None and own <= set(words(shown.get(call.id, ""))))
    ]  # fmt: skip
    names = {call.name for call in about} or {"noop"}
    right = names == {name}
    named = {call.id for call in about}
    with_id = name in ("update", "delete")
    # All entries of an ended fact go; of one that changed, any may be rewritten.
    meant = named == set(ids) if name == "delete" else bool(named) and named <= set(ids)
    id_right = with_id and meant
    written = all(normalize(call.content or "") == normalize(content) for call in about)
    return UpdateScores(
        gold=1, op_right=right, with_id=with_id, id_right=id_right,
        all_right=right and written and (id_right or not with_id),
    )  # fmt: skip
