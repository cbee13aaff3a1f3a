"""From a reply that is whole to the target as an expert shall write it: single facts and operations
that are no good are taken out, an answer is right or not.

Each function gives a `Verdict`. A record is dropped where nothing is left of it: a teacher that
wrote three wrong facts did not mean to write none.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from mnemic.models.memory.metrics import NONE, abstains, normalize
from mnemic.models.memory.op_prompts import EXTRACT, UPDATE, parse_facts, write_facts
from mnemic.models.memory.operations import CoreRewrite, Delete, Insert, Noop, Operation, Update
from mnemic.models.memory.syntax import MAX_CALLS, Lines
from mnemic.models.memory.text import first_line
from mnemic.train.distill.rules import Limits, Verdict, bare, is_refusal, matches
from mnemic.train.distill.support import borne_out, content_words, supported, undated

_BESIDE = "text beside the JSON list"
_BROKEN = ("the answer is empty", "no JSON list in the answer", "the JSON list is not closed")


def target(record: dict[str, Any], limits: Limits) -> Verdict:
    """What the expert of the record's operation shall write, or why it shall not learn from it."""
    if record["operation"] == EXTRACT:
        return facts_target(record)
    if record["operation"] == UPDATE:
        return update_target(record)
    return answer_target(record, limits)


def facts_target(record: dict[str, Any]) -> Verdict:
    """A list of facts, each once and each borne out by the chunk."""
    facts, error = parse_facts(record["reply"])
    removed: Counter[str] = Counter()
    if error is not None and "were read" in error:
        return Verdict(rule="long", detail=error)
    if error is not None and (not facts or error.startswith(_BROKEN)):
        return Verdict(rule="unparsable", detail=f"{error}: {_start(record)}")
    if error is not None:
        # Prose around a list is left out; anything else is one item that is no fact.
        removed["beside" if error == _BESIDE else "unparsable"] += 1
    context = record["context"]
    source = f"{context['date'] or ''}\n{context['chunk']}"
    kept: list[str] = []
    said: set[str] = set()
    for fact in facts:
        if is_refusal(fact):
            removed["refused"] += 1
        elif not normalize(fact):
            removed["empty"] += 1
        elif normalize(fact) in said:
            removed["repeats"] += 1
        elif not supported(fact, source):
            removed["unsupported"] += 1
        else:
            kept.append(fact)
            said.add(normalize(fact))
    if facts and not kept:
        return _nothing_left(removed, record)
    return Verdict(write_facts(kept), repaired=removed)


def update_target(record: dict[str, Any]) -> Verdict:
    """Operations that change what was shown, by the ids that were shown."""
    context = record["context"]
    shown: list[str] = context["shown"]
    calls = Lines().parse(bare(record["reply"]))
    if len(calls) > MAX_CALLS:
        return Verdict(rule="long", detail=calls[-1].error or "")
    known = {word for text in (*context["facts"], *shown) for word in content_words(text)}
    removed: Counter[str] = Counter()
    kept: list[Operation] = []
    silent = False
    for call in calls:
        operation = call.operation
        if isinstance(operation, Insert | Update):
            operation, copied = _timeless(operation, shown)
            removed["beside"] += copied
        if operation is None:
            removed["unparsable"] += 1
        elif isinstance(operation, Noop):
            silent = True
        elif wrong := wrong_call(operation, shown, kept, known):
            removed[wrong] += 1
        else:
            kept.append(operation)
    if not kept and not silent:
        return _nothing_left(removed, record)
    if not kept and removed.total() > removed["beside"]:
        # A noop beside what was no good says nothing about that.
        return _nothing_left(removed, record)
    return Verdict(Lines().write(kept or [Noop()]), repaired=+removed)


def _timeless(call: Insert | Update, shown: Sequence[str]) -> tuple[Insert | Update, bool]:
    """Without the time of a shown entry that was copied into the text: the store keeps times beside
    texts, and would show it twice. And whether it was there.
    """
    content = undated(call.content)
    time = call.content[: len(call.content) - len(content)]
    if not content or not time or not any(text.startswith(time) for text in shown):
        return call, False
    return call.model_copy(update={"content": content}), True


def wrong_call(
    call: Operation, shown: Sequence[str], before: Sequence[Operation], known: set[str]
) -> str | None:
    """The rule that an operation breaks. `before`: those of the same reply that stand; `known`:
    content words of the facts and of what was shown.
    """
    if isinstance(call, CoreRewrite) or (isinstance(call, Insert) and (call.kind or call.time)):
        return "event"
    texts = {normalize(undated(text)) for text in shown}
    if isinstance(call, Update | Delete):
        number = int(call.id[1:])
        twice = any(isinstance(b, Update | Delete) and b.id == call.id for b in before)
        if number >= len(shown) or twice:
            return "ids"
        if isinstance(call, Update):
            old = undated(shown[number])
            if " ".join(call.content.split()) == old:
                return "unchanged"
    if isinstance(call, Insert | Update):
        if is_refusal(call.content):
            return "refused"
        if not normalize(call.content):
            return "empty"
        new = [normalize(b.content) for b in before if isinstance(b, Insert | Update)]
        text = normalize(call.content)
        if text in new or (isinstance(call, Insert) and text in texts):
            return "existing"
        if not content_words(call.content) & known:
            return "unsupported"
    return None


def answer_target(record: dict[str, Any], limits: Limits) -> Verdict:
    """One short line, right by the gold and borne out by what was retrieved; `none` where the gold
    says so, or where nothing retrieved tells. Gold's own `none` is not judged.
    """
    answer = first_line(bare(record["reply"]))
    context = record["context"]
    gold = record["target_source"] == "gold"
    borne = borne_out(context["golds"], context["memories"], context["evidence"])
    knows = not any(normalize(text) == NONE for text in context["golds"])
    shown = f"{answer[:80]!r}, gold {context['golds'][0][:80]!r}"
    if abstains(answer):
        if knows and borne and not gold:
            return Verdict(rule="denied", detail=shown)
        return Verdict(NONE)
    if len(answer.split()) > limits.max_answer_words:
        return Verdict(rule="long", detail=f"{len(answer.split())} words: {answer[:80]!r}")
    if not gold and not matches({**record, "reply": answer}):
        return Verdict(rule="wrong", detail=shown)
    if not borne:
        return Verdict(rule="unborne", detail=shown)
    lines = [line for line in bare(record["reply"]).splitlines() if line.strip()]
    return Verdict(" ".join(answer.split()), repaired=Counter({"beside": 1} if lines[1:] else {}))


def _nothing_left(removed: Counter[str], record: dict[str, Any]) -> Verdict:
    """Dropped under the rule that took out the most."""
    rule = removed.most_common(1)[0][0] if removed else "unparsable"
    return Verdict(rule=rule, detail=f"nothing is left: {_start(record)}")


def _start(record: dict[str, Any]) -> str:
    return " ".join(record["reply"][:160].split())
