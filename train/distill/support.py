"""What of a text is borne out by another, by their words: gold targets and cleaning share it."""

import re
from collections.abc import Iterable, Sequence

from mnemic.models.memory.bm25 import words
from mnemic.models.memory.metrics import normalize

SAME_WORDS = 0.9
"""Share of common words (of all words of both) from which two facts say the same. One other word
in ten is a different fact: a month, a number, a name.
"""
_STEM = 5
"""Letters by which longer words are compared: painted and painting, hike and hiking do not differ
in what they speak of.
"""
_SPEAKER = re.compile(r"^([^:\n]{1,40}):\s", re.MULTILINE)
_DATE = re.compile(r"^\[[^\]]{1,80}\] ")
_STOPWORDS = frozenset(
    words(
        "a an and are as at be been being but by can could did do does doing for from had has "
        "have having he her hers him his how i if in into is it its just like me more most my no "
        "not now of on one or our out over own s she should so some such t than that the their "
        "them then there these they this those to too up very was we were what when where which "
        "while who whom why will with would yes you your"
    )
)


def content_words(text: str) -> set[str]:
    """Words that carry meaning, long ones by their beginning. Of a text that has none: all."""
    found = words(text)
    return {word[:_STEM] for word in found if word not in _STOPWORDS} or set(found)


def speakers(chunk: str) -> set[str]:
    """Names that lines of a dialogue begin with, as content words."""
    return {word for name in set(_SPEAKER.findall(chunk)) for word in content_words(name)}


def supported(fact: str, chunk: str) -> bool:
    """Whether the fact shares a content word with the chunk, beside the names of who speaks: those
    are in anything that is said of them.
    """
    aside = speakers(chunk)
    return bool((content_words(fact) - aside) & (content_words(chunk) - aside))


def same_fact(left: str, right: str) -> bool:
    """The same normal form, or at least `SAME_WORDS` of the words of both in common."""
    if normalize(left) == normalize(right):
        return True
    a, b = set(words(left)), set(words(right))
    return bool(a | b) and len(a & b) >= SAME_WORDS * len(a | b)


def undated(text: str) -> str:
    """An entry's text without its time."""
    return _DATE.sub("", text, count=1)


def borne_out(golds: Sequence[str], memories: Iterable[str], evidence: Iterable[str] = ()) -> bool:
    """Whether a memory holds a content word of a gold answer, or is one of the facts (`evidence`)
    that the chunks with the answer tell. Times of memories do not count: a year is in all of them.
    """
    texts = [undated(text) for text in memories]
    held = {word for text in texts for word in content_words(text)}
    known = {normalize(text) for text in texts}
    return any(content_words(gold) & held for gold in golds) or any(
        normalize(fact) in known for fact in evidence
    )
