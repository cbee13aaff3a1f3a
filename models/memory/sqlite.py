"""A memory that outlives its process: the same store, every operation one SQLite transaction.

What an operation returned is on disk: the journal is a WAL with synchronous=FULL, one fsync a
commit, so that neither a killed process nor a power cut takes it back. NORMAL would lose the last
commits at a power cut; an operation follows a model's generation, beside which an fsync (about a
millisecond on an SSD) is nothing. Training holds its stores in memory.

The file belongs to one process while it is open (locking_mode=EXCLUSIVE; the lock goes with the
process, however it ends). Not for network file systems, and not across a fork.
"""

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mnemic.models.memory.store import Entry, Memory
from mnemic.models.memory.stores import StoreKind, make_store

APPLICATION = 0x6D6E656D  # "mnem", in the file's header.
VERSION = 1

_SCHEMA = f"""
CREATE TABLE memory (kind TEXT NOT NULL, turn INTEGER NOT NULL, next INTEGER NOT NULL);
CREATE TABLE core (position INTEGER PRIMARY KEY, content TEXT NOT NULL, turn INTEGER NOT NULL);
CREATE TABLE entries (
    number INTEGER PRIMARY KEY, kind TEXT NOT NULL, content TEXT NOT NULL, turn INTEGER NOT NULL,
    changed INTEGER NOT NULL, time TEXT, deleted INTEGER NOT NULL, written INTEGER NOT NULL
);
CREATE TABLE versions (
    number INTEGER NOT NULL, position INTEGER NOT NULL, content TEXT NOT NULL,
    turn INTEGER NOT NULL, PRIMARY KEY (number, position)
) WITHOUT ROWID;
PRAGMA application_id = {APPLICATION};
PRAGMA user_version = {VERSION};
"""


def open_store(path: str | os.PathLike[str], kind: StoreKind, **limits: Any) -> "SqliteMemory":
    """The memory in the file `path`, made where there is none; `limits` are `make_store`'s and are
    not kept in the file: one with more in it than they allow opens, and refuses what would add.

    Raises:
        ValueError: the file is not a memory, is damaged, is of another kind, was written by a newer
            version, or is open elsewhere.
    """
    return SqliteMemory(path, kind, make_store(kind, **limits))


class SqliteMemory(Memory):
    """Use `open_store`. `shape` is an empty memory with the kinds and bounds wanted.

    A failure of the disk is a `sqlite3.Error` (never `OperationError`, which a model is shown), and
    changes nothing. `turn` is kept with each operation. `without` and `empty` give memories that
    have no file. Close it, or use it as a context manager.
    """

    def __init__(self, path: str | os.PathLike[str], kind: StoreKind, shape: Memory) -> None:
        super().__init__(
            shape.kinds, core_tokens=shape.core_tokens, max_tokens=shape.max_tokens,
            max_content=shape.max_content, count=shape.count, index=shape.make_index,
        )  # fmt: skip
        self.path = Path(path)
        try:
            # No waiting for a lock: who holds it keeps it until the process ends.
            self._db = sqlite3.connect(self.path, timeout=0, isolation_level=None)
        except sqlite3.Error as error:
            raise ValueError(f"{self.path} cannot be opened ({error})") from None
        try:
            self._open(kind)
        except sqlite3.DatabaseError as error:
            self._db.close()
            busy = "locked" in str(error)
            damaged = f"is damaged or no memory ({error})"
            reason = "is open already, most likely in another process" if busy else damaged
            raise ValueError(f"{self.path} {reason}") from None
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> "SqliteMemory":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def restore(self, state: dict[str, Any]) -> None:
        """Put a `snapshot` back, in one transaction."""

        def all_of_it() -> None:
            Memory.restore(self, state)
            for table in ("entries", "versions", "core"):
                self._db.execute(f"DELETE FROM {table}")
            for entry in self._entries.values():
                self._write(entry, known=0)
            rows = [(at, *version) for at, version in enumerate(self._core_history)]
            self._db.executemany("INSERT INTO core VALUES (?, ?, ?)", rows)

        self._commit(all_of_it)

    def _put(self, entry: Entry) -> None:
        old = self._entries.get(entry.id)

        def put() -> None:
            self._write(entry, known=0 if old is None else len(old.previous))
            Memory._put(self, entry)

        self._commit(put)

    def _put_core(self, content: str) -> None:
        def put() -> None:
            row = (len(self._core_history), content, self.turn)
            self._db.execute("INSERT INTO core VALUES (?, ?, ?)", row)
            Memory._put_core(self, content)

        self._commit(put)

    def _write(self, entry: Entry, known: int) -> None:
        number = int(entry.id[1:])
        self._db.execute(
            "INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (number, entry.kind, entry.content, entry.turn, entry.changed, entry.time,
             int(entry.deleted), entry.written),
        )  # fmt: skip
        rows = [(number, at, *v) for at, v in enumerate(entry.previous)]
        self._db.executemany("INSERT INTO versions VALUES (?, ?, ?, ?)", rows[known:])

    def _commit(self, change: Callable[[], None]) -> None:
        try:
            with self._transaction():
                change()
                self._db.execute("UPDATE memory SET turn = ?, next = ?", (self.turn, self._next))
        except BaseException:
            # Whatever went wrong, and wherever: what is held is what is on disk.
            turn = self.turn
            self._load()
            self.turn = turn
            raise

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def _open(self, kind: StoreKind) -> None:
        db = self._db
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("PRAGMA synchronous = FULL")
        # Nothing is written before the file is known to be ours. A new one comes into being in one
        # transaction, before the switch to WAL: killed in between, it is empty or whole.
        with self._transaction():
            tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if tables == 0 and self._pragma("application_id") == 0:
                for statement in _SCHEMA.split(";"):
                    db.execute(statement)
                db.execute("INSERT INTO memory VALUES (?, 0, 0)", (kind,))
        if self._pragma("application_id") != APPLICATION:
            raise ValueError(f"{self.path} is a database of another program, not a memory")
        version = self._pragma("user_version")
        if version != VERSION:
            raise ValueError(
                f"{self.path} is a memory of format {version}; this version reads {VERSION}"
            )
        if (fault := self._pragma("quick_check(1)")) != "ok":
            fault = " ".join(fault.split())
            raise ValueError(f"{self.path} is damaged ({fault})")
        db.execute("PRAGMA journal_mode = WAL")
        with self._transaction():
            pass  # Takes the lock, which EXCLUSIVE keeps.
        self._load(kind)

    def _pragma(self, name: str) -> Any:
        return self._db.execute(f"PRAGMA {name}").fetchone()[0]

    def _load(self, kind: StoreKind | None = None) -> None:
        rows = self._db.execute
        try:
            held, turn, count = rows("SELECT kind, turn, next FROM memory").fetchone()
            if kind is not None and held != kind:
                raise ValueError(f"{self.path} holds a {held!r} memory, not {kind!r}")
            previous: dict[int, list[tuple[str, int]]] = {}
            for number, content, when in rows(
                "SELECT number, content, turn FROM versions ORDER BY number, position"
            ):
                previous.setdefault(number, []).append((content, when))
            entries = [
                {
                    "id": f"m{number}", "kind": own, "content": content, "turn": first,
                    "changed": changed, "time": time, "deleted": bool(deleted),
                    "written": written, "previous": previous.get(number, []),
                }
                for number, own, content, first, changed, time, deleted, written in rows(
                    "SELECT number, kind, content, turn, changed, time, deleted, written"
                    " FROM entries ORDER BY number"
                )
            ]  # fmt: skip
            core = rows("SELECT content, turn FROM core ORDER BY position").fetchall()
            state = {
                "core": core[-1][0] if core else "", "core_history": core, "turn": turn,
                "next": count, "entries": entries,
            }  # fmt: skip
            Memory.restore(self, state)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"{self.path} is damaged ({error})") from None
