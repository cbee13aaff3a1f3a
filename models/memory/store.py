"""What a memory holds: entries with short ids, versions and soft deletion, and a core text.

One implementation, `Memory`, and three shapes of it (stores.py): typed (Mem-alpha, arXiv
2509.25911: core, semantic, episodic), a flat bank (Memory-R1, 2508.19828) and one text that is
overwritten (MemAgent, 2507.02259). Ids are m0, m1, ...: two tokens that a small model can copy. An
update keeps what it replaced; a deleted entry stays, marked, so that a stale answer is known as
such.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from mnemic.models.memory.bm25 import BM25
from mnemic.models.memory.retrieve import Index

# A run of letters is not one piece however long: words_joined_like_this, or a script that is
# written without spaces, would be a memory for free to a model that is paid for a short one.
_CJK = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af"
_PIECE = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]{{1,16}}|_|[^\w\s]")


def count_pieces(text: str) -> int:
    """Words (of up to 16 letters) and punctuation marks: about the tokens of a large vocabulary."""
    return len(_PIECE.findall(text))


class OperationError(ValueError):
    """An operation the memory refuses; the text is shown to the model that asked for it."""


@dataclass(slots=True)
class Entry:
    """One thing remembered. `turn` brought it, `written` its present content, `changed` touched it
    last (its update or deletion); `previous` are the contents it replaced, oldest first, each with
    the turn that wrote it.
    """

    id: str
    kind: str
    content: str
    turn: int
    changed: int
    time: str | None = None
    previous: list[tuple[str, int]] = field(default_factory=list)
    deleted: bool = False
    written: int = -1

    def __post_init__(self) -> None:
        if self.written < 0:
            self.written = self.turn if self.deleted else self.changed

    @property
    def text(self) -> str:
        """As it is shown and searched."""
        return f"[{self.time}] {self.content}" if self.time else self.content


@dataclass(frozen=True, slots=True)
class Change:
    """One line of a diff: `op` is insert, update, delete or core."""

    op: str
    id: str
    before: str | None
    after: str | None


class MemoryStore(Protocol):
    """What operations, views and answerers need of a memory."""

    kinds: tuple[str, ...]
    core: str
    turn: int

    def insert(self, content: str, kind: str | None = None, time: str | None = None) -> Entry: ...
    def update(self, id: str, content: str) -> Entry: ...
    def delete(self, id: str) -> Entry: ...
    def rewrite_core(self, content: str) -> None: ...
    def get(self, id: str) -> Entry | None: ...
    def entries(self, kind: str | None = None) -> list[Entry]: ...
    def search(self, query: str, k: int, kind: str | None = None) -> list[Entry]: ...
    def tokens(self) -> int: ...
    def snapshot(self) -> dict[str, Any]: ...
    def diff(self, before: dict[str, Any]) -> list[Change]: ...


class Memory:
    """Entries of `kinds` (the first is the default; none: the core text only) and, with
    `core_tokens` above 0, a core text of at most so many tokens.

    `max_tokens` bounds the whole, `max_content` one entry, in `count`'s tokens. What would not fit
    is refused with `OperationError` and nothing is changed. `index` makes what `search` asks
    (retrieve.py); None is BM25.
    """

    def __init__(
        self,
        kinds: Sequence[str] = ("fact",),
        *,
        core_tokens: int = 0,
        max_tokens: int | None = None,
        max_content: int = 256,
        count: Callable[[str], int] = count_pieces,
        index: Callable[[], Index] | None = None,
    ) -> None:
        self.kinds = tuple(kinds)
        self.core_tokens, self.max_tokens, self.max_content = core_tokens, max_tokens, max_content
        self.count, self.make_index = count, index or BM25
        self.core = ""
        self.turn = 0
        self._core_history: list[tuple[str, int]] = []
        self._entries: dict[str, Entry] = {}
        self._next = 0
        self._tokens = 0
        self._index: Index = self.make_index()

    def insert(self, content: str, kind: str | None = None, time: str | None = None) -> Entry:
        """A new entry at the present turn. The same live text of the same kind and time is refused:
        it is there already.
        """
        kind = self._kind(kind)
        content = self._content(content)
        time = (_one_line(time) or None) if time else None
        twin = next(
            (e for e in self.entries(kind) if e.content == content and e.time == time), None
        )
        if twin:
            raise OperationError(f"{twin.id} says that already")
        entry = Entry(f"m{self._next}", kind, content, self.turn, self.turn, time)
        self._room(self.count(entry.text))
        self._put(entry)
        return entry

    def update(self, id: str, content: str) -> Entry:
        """Replace an entry's content; the old one goes to its history."""
        entry = self._live(id)
        content = self._content(content)
        if content == entry.content:
            raise OperationError(f"{id} says that already")
        new = replace(
            entry,
            content=content,
            changed=self.turn,
            written=self.turn,
            previous=[*entry.previous, (entry.content, entry.written)],
        )
        self._room(self.count(new.text) - self.count(entry.text))
        self._put(new)
        return new

    def delete(self, id: str) -> Entry:
        """Mark an entry as gone: no longer shown or found, still in its history."""
        entry = replace(self._live(id), deleted=True, changed=self.turn)
        self._put(entry)
        return entry

    def rewrite_core(self, content: str) -> None:
        """Put another core text in the place of the old one; empty clears it. One line: a line
        break in it could pass for an entry of the view.
        """
        if not self.core_tokens:
            raise OperationError("this memory has no core text")
        content = _one_line(content)
        size = self.count(content)
        if size > self.core_tokens:
            raise OperationError(
                f"the core text has {size} tokens, at most {self.core_tokens} fit; say less"
            )
        self._room(size - self.count(self.core))
        self._put_core(content)

    def number_from(self, first: int) -> None:
        """Give the next entry number `first`, which none may have yet."""
        assert first >= self._next, (first, self._next)
        self._next = first

    def get(self, id: str) -> Entry | None:
        """The entry of that id, deleted ones included."""
        return self._entries.get(id)

    def entries(self, kind: str | None = None) -> list[Entry]:
        """Live entries in the order they came."""
        return [
            e for e in self._entries.values() if not e.deleted and (kind is None or e.kind == kind)
        ]

    def history(self) -> list[Entry]:
        """All entries, deleted ones included."""
        return list(self._entries.values())

    def core_history(self) -> list[tuple[str, int]]:
        """All core texts, the present one last, each with the turn that wrote it."""
        return list(self._core_history)

    def search(self, query: str, k: int, kind: str | None = None) -> list[Entry]:
        """Live entries that the index finds for `query` (BM25: those that share a word), best
        first.
        """
        found = self._index.search(query, k if kind is None else len(self._index))
        hits = [self._entries[id] for id in found]
        return [e for e in hits if kind is None or e.kind == kind][:k]

    def tokens(self) -> int:
        """Tokens of all that is live."""
        return self._tokens

    def without(self, turn: int) -> "Memory":
        """A copy, in memory, as if `turn` had written nothing, later turns standing: its new
        entries are gone, its updates and deletions and its core text undone.
        """
        state = self.snapshot()
        kept = []
        for entry in self._entries.values():
            if entry.turn == turn:
                continue
            versions = [
                v for v in [*entry.previous, (entry.content, entry.written)] if v[1] != turn
            ]
            content, written = versions[-1]
            undone = entry.changed == turn
            kept.append(_plain(replace(
                entry, content=content, written=written, previous=versions[:-1],
                changed=written if undone else entry.changed,
                deleted=entry.deleted and not undone,
            )))  # fmt: skip
        cores = [version for version in self._core_history if version[1] != turn]
        state |= {"entries": kept, "core_history": cores, "core": cores[-1][0] if cores else ""}
        copy = self.empty()
        copy.restore(state)
        return copy

    def empty(self) -> "Memory":
        """A new memory with the same bounds."""
        return Memory(
            self.kinds, core_tokens=self.core_tokens, max_tokens=self.max_tokens,
            max_content=self.max_content, count=self.count, index=self.make_index,
        )  # fmt: skip

    def snapshot(self) -> dict[str, Any]:
        """All of it as plain values, for JSON and checkpoints."""
        return {
            "core": self.core, "core_history": list(self._core_history), "turn": self.turn,
            "next": self._next, "entries": [_plain(e) for e in self._entries.values()],
        }  # fmt: skip

    def restore(self, state: dict[str, Any]) -> None:
        """Put a `snapshot` back."""
        entries = [
            Entry(**{**raw, "previous": [(text, when) for text, when in raw["previous"]]})
            for raw in state["entries"]
        ]
        core, turn, count = state["core"], state["turn"], state["next"]
        cores = [(text, when) for text, when in state.get("core_history", ())]
        if core and not cores:
            cores = [(core, turn)]
        # Nothing is changed before all of the state has been read.
        self.core, self.turn, self._next, self._core_history = core, turn, count, cores
        self._entries, self._index = {}, self.make_index()
        self._tokens = self.count(core)
        for entry in entries:
            Memory._put(self, entry)

    def diff(self, before: dict[str, Any]) -> list[Change]:
        """What changed since the snapshot `before`, in the order of ids."""
        old = {raw["id"]: raw for raw in before["entries"]}
        changes = []
        if before["core"] != self.core:
            changes.append(Change("core", "core", before["core"], self.core))
        for entry in self._entries.values():
            was = old.get(entry.id)
            was_live = was is not None and not was["deleted"]
            past = was["content"] if was is not None and was_live else None
            if entry.deleted and was_live:
                changes.append(Change("delete", entry.id, past, None))
            elif not entry.deleted and not was_live:
                changes.append(Change("insert", entry.id, None, entry.content))
            elif not entry.deleted and past != entry.content:
                changes.append(Change("update", entry.id, past, entry.content))
        return changes

    # All that operations change goes through these two; a store on disk adds to them (sqlite.py).

    def _put(self, entry: Entry) -> None:
        old = self._entries.get(entry.id)
        if old is not None and not old.deleted:
            self._tokens -= self.count(old.text)
        self._entries[entry.id] = entry
        self._next = max(self._next, int(entry.id[1:]) + 1)
        if entry.deleted:
            self._index.remove(entry.id)
        else:
            self._tokens += self.count(entry.text)
            self._index.put(entry.id, entry.text)

    def _put_core(self, content: str) -> None:
        self._tokens += self.count(content) - self.count(self.core)
        self.core = content
        self._core_history.append((content, self.turn))

    def _live(self, id: str) -> Entry:
        entry = self._entries.get(id)
        if entry is None or entry.deleted:
            raise OperationError(f"there is no {id[:20]!r}")
        return entry

    def _kind(self, kind: str | None) -> str:
        if not self.kinds:
            raise OperationError("this memory has no entries, only a core text")
        if kind is not None and kind not in self.kinds:
            raise OperationError(f"unknown kind {kind[:20]!r}; kinds are {', '.join(self.kinds)}")
        return kind or self.kinds[0]

    def _content(self, content: str) -> str:
        content = _one_line(content)
        if not content:
            raise OperationError("the content is empty")
        size = self.count(content)
        if size > self.max_content:
            raise OperationError(
                f"the content has {size} tokens, at most {self.max_content} fit an entry; say less"
            )
        return content

    def _room(self, more: int) -> None:
        # What makes it smaller is never refused: a memory may be over a limit set later.
        if self.max_tokens is not None and 0 < more > self.max_tokens - self._tokens:
            raise OperationError(
                f"the memory is full ({self._tokens} of {self.max_tokens} tokens); update or "
                "delete entries instead"
            )


def _one_line(text: str) -> str:
    # split() knows every character that ends a line for str.splitlines, \x85 and \u2028 too.
    text = " ".join(text.split())
    try:
        text.encode()
    except UnicodeEncodeError:
        raise OperationError("the text holds half a surrogate pair") from None
    return text


def _plain(entry: Entry) -> dict[str, Any]:
    # dataclasses.asdict copies deeply: 8 times slower, and a turn takes a snapshot.
    return {name: getattr(entry, name) for name in Entry.__slots__} | {
        "previous": list(entry.previous)
    }
