"""What is wrong with a reply of the teacher: one small function for each rule.

A row rule tells the detail that speaks against a whole record, or None. What is wrong with one fact
or one operation only is mended: see targets.py. A record counts under its first rule.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mnemic.models.memory.metrics import abstains, normalize
from mnemic.models.memory.op_prompts import EXTRACT, GENERATE, UPDATE
from mnemic.models.memory.text import first_line

REPEATS = 4
"""Equal lines, facts or runs of words in one reply from which it is a loop."""
PARROT_SHARE, PARROT_LEAST = 0.2, 5
"""Share and number of replies to different prompts from which the same text is no reply to any."""
SILENT_SHARE = 0.9
"""The same for `[]`, `noop` and `none`, which are right for many prompts."""

_THOUGHT = re.compile(r"\s*<think>.*?(?:</think>|\Z)", re.DOTALL)
_FENCE = re.compile(r"\A```[\w-]*\s*\n(.*?)\n?```\s*\Z", re.DOTALL)
_REFUSAL = re.compile(
    r"\W*(?:"
    r"(?:i['\u2019]?m |i am |we are |we['\u2019]re )?(?:so |very |really |truly )?sorry,? "
    r"(?:but )?(?:i|we) (?:can|could|am|'m|do|don|won|will|would)"
    r"|(?:unfortunately,? )?i (?:can(?:not|['\u2019]t| not)|am (?:unable|not able)"
    r"|['\u2019]m (?:unable|not able)|won['\u2019]t|will not) "
    r"(?:be able to |to )?(?:help|assist|comply|fulfil|provide|answer|process|do that|do this"
    r"|complete|create|generate|extract|summari[sz]e|share|discuss|continue)"
    r"|(?:i apologi[sz]e|my apologies)\b"
    r"|.{0,40}?\bas an? (?:ai|artificial intelligence|(?:large )?language model)\b"
    r"|.{0,40}?\bi['\u2019]?(?: a)?m (?:only |just )?an? (?:ai|(?:large )?language model)\b)",
    re.IGNORECASE,
)  # fmt: skip
_STRING = re.compile(r'"((?:[^"\\]|\\.)*)"')
_SILENCE = {EXTRACT: "[]", UPDATE: "noop", GENERATE: "none"}


@dataclass(frozen=True)
class Limits:
    """What the command line sets. `max_tokens` counts words and marks of prompt and target."""

    max_tokens: int | None = None
    max_answer_words: int = 12
    dedupe: bool = True


@dataclass
class Verdict:
    """Either a target, or the rule that dropped the record and what it saw. `repaired`: rules that
    took single items out, each with their number.
    """

    target: str | None = None
    rule: str | None = None
    detail: str = ""
    repaired: Counter[str] = field(default_factory=Counter)


def bare(reply: str) -> str:
    """Without thoughts, and without the code fence where that is around all of it."""
    text = _THOUGHT.sub("", reply, count=1).strip()
    fence = _FENCE.match(text)
    return fence[1].strip() if fence else text


def is_refusal(text: str) -> bool:
    """Whether it begins as an assistant does that will not do as it is told."""
    return _REFUSAL.match(text) is not None


def failed(record: dict[str, Any]) -> str | None:
    """The teacher gave no reply: an error, a timeout, a prompt too long for it."""
    return record.get("error")


def refused(record: dict[str, Any]) -> str | None:
    """It would not do it. A list or operations that speak of a refusal are none."""
    text = bare(record["reply"])
    return _quote(text) if is_refusal(text) else None


def cut(record: dict[str, Any]) -> str | None:
    """It ran into its token limit: what would have followed is not known."""
    return f"...{record['reply'][-80:]}" if record.get("cut") else None


def empty(record: dict[str, Any]) -> str | None:
    """Nothing is there, thoughts aside."""
    return None if bare(record["reply"]) else _quote(record["reply"]) or "no text"


def loops(record: dict[str, Any]) -> str | None:
    """It says the same over and over: a fact, a line, or three words in an answer."""
    text = bare(record["reply"])
    if record["operation"] == EXTRACT:
        parts = [normalize(part) for part in _STRING.findall(text)]
    elif record["operation"] == UPDATE:
        parts = [normalize(line) for line in text.splitlines()]
    else:
        said = normalize(text).split()
        parts = [" ".join(said[i : i + 3]) for i in range(len(said) - 2)]
    most = Counter(part for part in parts if part).most_common(1)
    return f"{most[0][1]} times {most[0][0][:80]!r}" if most and most[0][1] >= REPEATS else None


def parrots(records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Key -> detail of replies that are one text for many prompts, by operation. Gold is none, and
    neither is a right answer: many questions of a stream may have the same one.
    """
    prompts: dict[tuple[str, str], set[str]] = defaultdict(set)
    told: Counter[str] = Counter()
    candidates = []
    for record in records:
        if record["target_source"] == "gold" or failed(record) or empty(record):
            continue
        operation, text = record["operation"], bare(record["reply"])
        told[operation] += 1
        if operation != GENERATE or not matches(record):
            prompts[operation, text].add(str(record["prompt"]))
            candidates.append((record["key"], operation, text))
    found = {}
    for key, operation, text in candidates:
        count = len(prompts[operation, text])
        share = SILENT_SHARE if _is_silent(operation, text) else PARROT_SHARE
        if count >= PARROT_LEAST and count > share * told[operation]:
            found[key] = f"the reply to {count} prompts: {_quote(text)}"
    return found


def matches(record: dict[str, Any]) -> bool:
    """Whether the first line of an answer is a gold one, by F1 of at least a half."""
    from mnemic.models.memory.metrics import f1

    return f1(first_line(record["reply"]), record["context"]["golds"]) >= 0.5


def _is_silent(operation: str, text: str) -> bool:
    if operation == GENERATE:
        return abstains(first_line(text))
    return "".join(text.split()) == _SILENCE[operation]


def _quote(text: str) -> str:
    return " ".join(text[:200].split())
