"""Texts on their way into a model and out of it: marks taken apart, long ones split, one answer
read.

What a memory holds came from outside and is untrusted. No tokenizer may read a mark of the chat in
it, or a stored line could end the user's turn and speak as the system.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from mnemic.models.memory.answer import Ask
from mnemic.models.memory.view import show_for

# Marks that chat models read as structure; "<|" opens those of most families, the wide bar
# DeepSeek's.
_OPENING = re.compile(
    r"<(?=[|\uff5c])"
    r"|[<\[](?=/?(?:s|bos|eos|pad|unk|INST|SYS|tool_call|tool_response|think|im_start|im_end"
    r"|start_of_turn|end_of_turn)[>\]])",
    re.IGNORECASE,
)
_THOUGHT = re.compile(r"\s*<think>.*?(?:</think>|\Z)", re.DOTALL)
_CUTS = (
    re.compile(r"(?<=\n)"),
    re.compile(r"(?<=[.!?])(?=\s)|(?<=[\u3002\uff01\uff1f])"),
    re.compile(r"(?<=\s)(?=\S)"),
)

INSTRUCTION = (
    "Answer the question from the memory, in a few words and nothing else. "
    'If the memory does not say, answer "none".'
)


def defuse(text: str, marks: Sequence[str] = ()) -> str:
    """`text` without what a tokenizer reads as marks of the chat: `<|` becomes `< |`, and so on.
    `marks`: more of them, those of the tokenizer at hand (`marks_of`).
    """
    text = _OPENING.sub(lambda match: match[0] + " ", text)
    for mark in marks:
        text = text.replace(mark, f"{mark[0]} {mark[1:]}")
    return text


def marks_of(tokenizer: Any) -> tuple[str, ...]:
    """Added tokens of `tokenizer` that look like marks; runs of spaces and plain words, which some
    tokenizers add as well, do not.
    """
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    return tuple(a for a in added if len(a) > 1 and a.strip() == a and not a[0].isalnum())


def memory_text(ask: Ask, k: int, max_tokens: int, count: Callable[[str], int]) -> str:
    """The memory that a reader is shown, at most `max_tokens` of `count`: all of it, else the core
    and as many as fit of the `k` entries the question finds, else the beginning of the core.
    """
    text = show_for(ask.memory, ask.question, k, max_tokens)
    # The store counts pieces and the model tokens, and entries found are not bounded at all.
    for fewer in range(k, -1, -1):
        if count(text) <= max_tokens:
            return text
        text = show_for(ask.memory, ask.question, fewer, -1)
    if count(text) <= max_tokens:
        return text
    return next(iter(split_text(text, max_tokens, count)), "") if max_tokens > 0 else ""


def reader_prompt(memory: str, question: str) -> str:
    """One user message: some chat templates refuse a system one."""
    return f"{INSTRUCTION}\n\nMemory:\n{memory or '(empty)'}\n\nQuestion: {question}"


def first_line(text: str) -> str:
    """The answer in a model's output: its first line with text, thoughts aside."""
    text = _THOUGHT.sub("", text, count=1)
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def split_text(text: str, limit: int, count: Callable[[str], int]) -> list[str]:
    """Parts of at most `limit` (at least 1) of `count`, cut at ends of lines where that suffices,
    else of sentences, else of words, else anywhere; a part without text is left out.
    """
    assert limit > 0
    text = text.strip()
    if not text:
        return []
    if len(text) == 1 or count(text) <= limit:
        return [text]
    for cut in _CUTS:
        groups = _pack(cut.split(text), limit, count)
        if len(groups) > 1:
            break
    else:
        groups = [text[: len(text) // 2], text[len(text) // 2 :]]
    # Again, for a single piece over the limit, and for tokens that span the seams of a group.
    return [part for group in groups for part in split_text(group, limit, count)]


def _pack(pieces: Sequence[str], limit: int, count: Callable[[str], int]) -> list[str]:
    """Neighbours joined while their sizes add up to at most `limit`."""
    groups: list[str] = []
    size = 0
    for piece in pieces:
        more = count(piece)
        if not groups or size + more > limit:
            groups.append(piece)
            size = more
        else:
            groups[-1] += piece
            size += more
    return groups
