"""What a model sees of a memory: never all of it, always what the text at hand is about.

Core text, the entries that a search for the new text finds, and the most recent ones, in the order
of their ids. Mem-alpha shows only the last few, so that an older entry can never be updated or
deleted; the search is what makes those operations learnable (and useful) in long streams.
"""

from dataclasses import dataclass

from mnemic.models.memory.store import Entry, Memory


@dataclass(frozen=True, slots=True)
class View:
    """The text that is shown, and the ids in it: only those may be changed."""

    text: str
    ids: frozenset[str]


@dataclass(frozen=True, slots=True)
class ViewPolicy:
    """At most `retrieved` entries found by the text, and `recent` touched last; then entries are
    left out, the least wanted first, until the text has at most `max_tokens` (the store's tokens).
    The core text is always whole, even where it alone is more.
    """

    retrieved: int = 8
    recent: int = 4
    max_tokens: int = 1024

    def render(self, store: Memory, about: str) -> View:
        wanted: dict[str, Entry] = {e.id: e for e in store.search(about, self.retrieved)}
        if self.recent:
            latest = sorted(store.entries(), key=lambda e: (-e.changed, -int(e.id[1:])))
            for entry in latest[: self.recent]:
                wanted.setdefault(entry.id, entry)
        room = self.max_tokens - store.count(store.core)
        kept: list[Entry] = []
        for entry in wanted.values():
            room -= store.count(line_of(entry))
            if room < 0:
                break
            kept.append(entry)
        # Headings and line breaks cost too, and a tokenizer's counts do not simply add up.
        while store.count(text := _text(store, kept)) > self.max_tokens and kept:
            kept.pop()
        return View(text, frozenset(e.id for e in kept))


def _text(store: Memory, entries: list[Entry]) -> str:
    entries = sorted(entries, key=lambda e: int(e.id[1:]))
    lines = [f"core: {store.core}"] if store.core_tokens else []
    if len(store.kinds) > 1:
        for kind in store.kinds:
            own = [line_of(e) for e in entries if e.kind == kind]
            lines += [f"{kind}:", *own] if own else []
    else:
        lines += [line_of(e) for e in entries]
    return "\n".join(lines)


def line_of(entry: Entry) -> str:
    return f"{entry.id} {entry.text}"


def show_for(store: Memory, question: str, k: int, max_tokens: int) -> str:
    """The memory as an answerer reads it: all of it where it fits `max_tokens`, else the core text
    and the `k` entries that the question finds, best last (nearest to the question).
    """

    def text(entries: list[Entry]) -> str:
        core = [store.core] if store.core else []
        return "\n".join([*core, *(f"- {entry.text}" for entry in entries)])

    # The first test spares counting a large store's text.
    if store.tokens() <= max_tokens and store.count(whole := text(store.entries())) <= max_tokens:
        return whole
    return text(store.search(question, k)[::-1])
