"""Prompts of the three memory operations, and the reader of extracted facts: pure functions, so
that training data and use are the same text.

The stages are Mem0's (arXiv 2504.19413, as MemLoRA, 2512.04763, distils them), the words our own
and short: a small expert needs to be told which operation it is, not taught it by examples. Three
things differ. A prompt is one user message, because some chat templates (Gemma 2) refuse a system
one. The update answers with changed entries only, in the `lines` syntax, where Mem0 echoes every
old memory. Old entries are numbered m0, m1, ... in the prompt, whatever their ids are in the store.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

from mnemic.models.memory.operations import validate
from mnemic.models.memory.store import OperationError
from mnemic.models.memory.text import defuse, reader_prompt

Messages = list[dict[str, str]]

EXTRACT, UPDATE, GENERATE = "mem_extract", "mem_update", "mem_generate"
OPERATIONS = (EXTRACT, UPDATE, GENERATE)
MAX_FACTS = 64
"""Facts of one chunk that are read; more are one error."""

_EXTRACT = (
    "List what the text says that is worth remembering for later questions, as a JSON list of "
    "strings: one short fact each, with its names, and with dates where it tells them. Leave out "
    "small talk; answer [] if nothing is left."
)
_UPDATE = (
    "Bring the memory up to date with the new facts. Write one operation a line, only for what "
    "changes:\n"
    "+ text: remember what the memory lacks\n"
    "= m3 text: replace m3, which is out of date\n"
    "- m3: delete m3, which no longer holds\n"
    "noop: nothing changes"
)
_THOUGHT = re.compile(r"\s*<think>.*?(?:</think>|\Z)", re.DOTALL)
_FENCE = re.compile(r"```[\w-]*\s*\n?(.*?)(?:```|\Z)", re.DOTALL)
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)


def extract_messages(chunk: str, date: str | None = None) -> Messages:
    """`date`: when the chunk was said; days that it names by their distance need it."""
    head = f"Date: {_line(date)}\n" if date else ""
    return _user(f"{_EXTRACT}\n\n{head}Text:\n{defuse(chunk.strip())}")


def update_messages(entries: Sequence[str], facts: Sequence[str]) -> Messages:
    """`entries`: texts of old entries, shown as m0, m1, ... in this order."""
    old = [f"m{n} {_line(text)}" for n, text in enumerate(entries)] or ["(empty)"]
    new = [f"- {_line(fact)}" for fact in facts]
    return _user("\n".join([_UPDATE, "", "Memory:", *old, "New facts:", *new]))


def generate_messages(memories: Sequence[str], question: str) -> Messages:
    """`memories`: texts of retrieved entries, the best last (nearest to the question)."""
    memory = "\n".join(f"- {_line(text)}" for text in memories)
    return _user(reader_prompt(memory, defuse(question.strip())))


def write_facts(facts: Sequence[str]) -> str:
    """The target of an extraction; `parse_facts` gives the facts back."""
    return json.dumps(list(facts), ensure_ascii=False)


def parse_facts(text: str) -> tuple[list[str], str | None]:
    """(facts, error) of what a model answered to `extract_messages`; raises nothing.

    Thoughts and code fences are taken off; `{"facts": [...]}`, Mem0's form, is read as the list.
    Otherwise the first JSON list in the text is taken, or the whole strings of one that was cut
    off. Facts in one line, each once. The error says why the text is not simply a list of facts;
    what could be read is there all the same.
    """
    text = _THOUGHT.sub("", text, count=1).strip()
    if (fence := _FENCE.search(text)) and "[" in fence[1]:
        text = fence[1].strip()
    value, error = _first_list(text)
    facts: list[str] = []
    seen: set[str] = set()
    for item in value[:MAX_FACTS]:
        try:
            if not isinstance(item, str):
                raise OperationError(f"a fact is {type(item).__name__}, not a string")
            # The store's own rules: no control characters, no marks of a chat template.
            fact = validate("insert", {"content": " ".join(item.split())}).content  # type: ignore[union-attr]
        except OperationError as why:
            error = error or str(why).removeprefix("insert: ")
            continue
        if fact.casefold() not in seen:
            seen.add(fact.casefold())
            facts.append(fact)
    if len(value) > MAX_FACTS:
        error = error or f"{len(value)} facts; the first {MAX_FACTS} were read"
    return facts, error


def _first_list(text: str) -> tuple[list[Any], str | None]:
    if not text:
        return [], "the answer is empty"
    try:
        whole = json.loads(text)
        if isinstance(whole, dict) and set(whole) == {"facts"}:
            whole = whole["facts"]
        if isinstance(whole, list):
            return whole, None
    except (ValueError, RecursionError):
        pass
    decoder = json.JSONDecoder()
    # A few places only: each try may read the text to its end.
    for match in list(re.finditer(r"\[", text))[:16]:
        try:
            value, _ = decoder.raw_decode(text, match.start())
        except (ValueError, RecursionError):
            continue
        return value, "text beside the JSON list"
    start = text.find("[")
    if start < 0:
        return [], "no JSON list in the answer"
    whole_strings = []
    for match in list(_STRING.finditer(text, start))[: MAX_FACTS + 1]:
        try:
            whole_strings.append(json.loads(match[0]))
        except ValueError:
            continue
    return whole_strings, "the JSON list is not closed or not valid"


def _user(text: str) -> Messages:
    return [{"role": "user", "content": text}]


def _line(text: str) -> str:
    # A line break in it could pass for another entry.
    return defuse(" ".join(text.split()))
