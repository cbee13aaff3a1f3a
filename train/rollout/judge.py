"""A model behind an endpoint says of each answer whether it is right: the J of Mem0 and MemLoRA,
by a prompt of our own.
"""

import re
from collections.abc import Sequence
from typing import Any

from mnemic.models.memory.metrics import NONE, normalize
from mnemic.models.memory.text import defuse
from mnemic.train.data.memory.episode import EpisodeRow, Question

_PROMPT = """\
Grade an answer to a question about earlier conversations. It is CORRECT if it speaks of the same \
thing as the right answer, however it is worded: be generous with length, with more detail and \
with the form of dates. It is WRONG if it names another thing or another time, or says nothing. \
Reply with one word, CORRECT or WRONG.

Question: {question}
Right answer: {gold}
Answer to grade: {answer}"""
_UNKNOWN = "(the conversations do not tell; only an answer that says so is correct)"
_VERDICT = re.compile(r"\b(CORRECT|WRONG|INCORRECT)\b", re.IGNORECASE)


def judge(
    endpoint: Any, rows: Sequence[EpisodeRow], answers: Sequence[Sequence[str]]
) -> tuple[list[list[bool]], int]:
    """(verdicts by row, how many replies held none and count as wrong). `endpoint`: an `Endpoint`;
    `EndpointError` where it fails.
    """
    asked = [
        [prompt(q, answer) for q, answer in zip(row.questions, own, strict=True)]
        for row, own in zip(rows, answers, strict=True)
    ]
    replies = iter(endpoint.complete([one for own in asked for one in own]))
    unread, found = 0, []
    for own in asked:
        said = [_VERDICT.findall(next(replies)) for _ in own]
        unread += sum(not one for one in said)
        # The last word counts: a model that thinks aloud weighs both first.
        found.append([bool(one) and one[-1].upper() == "CORRECT" for one in said])
    return found, unread


def prompt(question: Question, answer: str) -> list[dict[str, str]]:
    """One user message: the question, any one of its right answers, and what was said."""
    golds = [_UNKNOWN if normalize(gold) == NONE else gold for gold in question.answers]
    text = _PROMPT.format(
        question=defuse(question.q), gold=defuse(" or ".join(golds)),
        answer=defuse(" ".join(answer.split())) or "(nothing)",
    )  # fmt: skip
    return [{"role": "user", "content": text}]
