"""BM25 over a handful of entries, kept in place as they come, change and go.

Lucene's idf, ln(1 + (N - n + 0.5) / (n + 0.5)), is positive for every term. The textbook's is zero
or negative for a term in half of the entries, which in a small memory ranks the wrong one first.
"""

import heapq
import math
import re
from collections import Counter
from collections.abc import Iterable

_WORD = re.compile(r"[^\W_]+")
_POSSESSIVE = re.compile(r"['\u2019]s\b")


def words(text: str) -> list[str]:
    """Lower-case words, punctuation and a possessive 's aside."""
    return _WORD.findall(_POSSESSIVE.sub("", text.lower()))


class BM25:
    """Documents by key. `search` costs a pass over the documents that share a word.

    Of equals the one that came first is first; a document that is replaced keeps its place, so that
    a store read back from a snapshot finds in the same order as the one that lived.
    """

    def __init__(self, k1: float = 1.2, b: float = 0.75) -> None:
        self.k1, self.b = k1, b
        self._documents: dict[str, Counter[str]] = {}
        self._lengths: dict[str, int] = {}
        self._places: dict[str, int] = {}
        self._holders: dict[str, dict[str, int]] = {}
        self._length = self._came = 0

    def __len__(self) -> int:
        return len(self._documents)

    def put(self, key: str, text: str) -> None:
        """Add a document, or replace it."""
        place = self._places.get(key, self._came)
        self.remove(key)
        self._places[key] = place
        self._came = max(self._came, place + 1)
        self._documents[key] = counts = Counter(words(text))
        self._lengths[key] = length = counts.total()
        self._length += length
        for word, count in counts.items():
            self._holders.setdefault(word, {})[key] = count

    def remove(self, key: str) -> None:
        """Forget a document; nothing where there is none."""
        counts = self._documents.pop(key, None)
        if counts is None:
            return
        del self._places[key]
        self._length -= self._lengths.pop(key)
        for word in counts:
            holders = self._holders[word]
            del holders[key]
            if not holders:
                del self._holders[word]

    def scores(self, query: str, only: Iterable[str] | None = None) -> dict[str, float]:
        """Of every document that shares a word with the query, or of those of `only`."""
        found: dict[str, float] = {}
        total = len(self._documents)
        mean = self._length / total if total else 1.0
        chosen = None if only is None else list(only)
        low, slope = self.k1 * (1 - self.b), self.k1 * self.b / (mean or 1.0)
        lengths = self._lengths
        for word in dict.fromkeys(words(query)):
            holders = self._holders.get(word, {})
            idf = math.log(1 + (total - len(holders) + 0.5) / (len(holders) + 0.5))
            pairs = (
                holders.items()
                if chosen is None
                else [(key, holders[key]) for key in chosen if key in holders]
            )
            for key, tf in pairs:
                score = idf * tf / (tf + low + slope * lengths[key])
                found[key] = found.get(key, 0.0) + score
        return found

    def search(self, query: str, k: int, only: Iterable[str] | None = None) -> list[str]:
        """The `k` best keys, best first; of equals the one that came first."""
        found, places = self.scores(query, only), self._places
        return heapq.nsmallest(k, found, key=lambda key: (-found[key], places[key]))
