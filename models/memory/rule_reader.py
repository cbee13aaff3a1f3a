"""An answerer without a model: exact where entries say `ENTITY ATTRIBUTE VALUE`, as generated
streams have them, and deterministic everywhere.

Of several entries that fit, the first one written answers: a memory that kept a superseded value
is answered from with it, so that updating and deleting matter.
"""

import re
from collections.abc import Sequence

from mnemic.models.memory.answer import Ask
from mnemic.models.memory.bm25 import words
from mnemic.models.memory.store import Entry, Memory

NONE = "none"
_FILLER = frozenset(
    words(
        "what who where which is was are the a an of s does do did has have in at to now "
        "currently current named called with and"
    )
)
_COUNT = re.compile(r"how many (.+?)\??$", re.IGNORECASE)
_SAME = re.compile(r"who (?:else )?has the same (\w+) as (\w+)", re.IGNORECASE)
_BEFORE = re.compile(r"\b(?:before|previous(?:ly)?|earlier|former)\b", re.IGNORECASE)


def _content(text: str) -> list[str]:
    return [w for w in words(text) if w not in _FILLER]


class RuleReader:
    """Answers `ENTITY ATTRIBUTE?` by the rest of the first entry that has both words; also
    `previous ENTITY ATTRIBUTE?` from histories, `how many ATTRIBUTE VALUE?` and `who has the same
    ATTRIBUTE as ENTITY?`. "none" where nothing fits.
    """

    def answer(self, asks: Sequence[Ask]) -> list[str]:
        return [self._one(ask.question, ask.memory) for ask in asks]

    def _one(self, question: str, memory: Memory) -> str:
        if match := _SAME.search(question):
            return self._same(memory, match[1].lower(), match[2].lower())
        if match := _COUNT.search(question):
            wanted = set(_content(match[1]))
            return str(sum(wanted <= set(words(e.content)) for e in memory.entries()))
        if _BEFORE.search(question):
            return self._before(memory, _content(_BEFORE.sub("", question)))
        wanted = _content(question)
        found = _first(memory.entries(), wanted)
        return _rest(found.content, wanted) if found else NONE

    def _same(self, memory: Memory, attribute: str, entity: str) -> str:
        entries = memory.entries()
        own = _first(entries, [entity, attribute])
        if own is None:
            return NONE
        value = _rest(own.content, [entity, attribute]).split()
        for entry in entries:
            have = words(entry.content)
            if entity not in have and attribute in have and set(value) <= set(have):
                return _rest(entry.content, [attribute, *value])
        return NONE

    def _before(self, memory: Memory, wanted: list[str]) -> str:
        found = _first([e for e in memory.history() if e.previous], wanted)
        return _rest(found.previous[-1][0], wanted) if found else NONE


def _first(entries: list[Entry], wanted: list[str]) -> Entry | None:
    if not wanted:
        return None
    need = set(wanted)
    return next((e for e in entries if need <= set(words(e.content))), None)


def _rest(content: str, known: list[str]) -> str:
    left = [w for w in words(content) if w not in known and w not in _FILLER]
    return " ".join(left) or NONE
