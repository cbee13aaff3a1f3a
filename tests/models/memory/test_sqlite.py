"""The store on disk: what it returned is there, whatever becomes of the process; only our files."""

import random
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from mnemic.models.memory.bm25 import BM25
from mnemic.models.memory.sqlite import open_store
from mnemic.models.memory.store import Memory, OperationError
from mnemic.models.memory.stores import make_store

LIMITS = {"core_tokens": 12, "max_tokens": 600}


def contents(store):
    state = store.snapshot()
    state.pop("turn")  # Kept with the next operation.
    return state


def filled(store):
    store.turn = 3
    store.insert("anna lives in rome")
    store.insert("zo\u00eb \U0001f600 'quoted\"; DROP TABLE entries; --", "episodic", "1 May")
    store.turn = 4
    store.update("m0", "anna lives in oslo")
    store.update("m0", "anna lives in bern")
    store.delete("m1")
    store.rewrite_core("likes tea")
    store.rewrite_core("likes cake")
    return store


def test_all_of_it_is_there_again(tmp_path):
    path = tmp_path / "memory.db"
    with open_store(path, "typed", **LIMITS) as store:
        filled(store)
        state = store.snapshot()
    assert state == filled(make_store("typed", **LIMITS)).snapshot()
    with open_store(path, "typed", **LIMITS) as store:
        assert store.snapshot() == state and store.turn == 4 and store.max_tokens == 600
        assert store.get("m0").previous == [("anna lives in rome", 3), ("anna lives in oslo", 4)]
        assert store.get("m1").deleted and store.core_history()[0] == ("likes tea", 4)
        assert [e.id for e in store.search("anna", 3)] == ["m0"]
        assert store.insert("next").id == "m2"
        state = store.snapshot()
    assert [p.name for p in tmp_path.iterdir()] == ["memory.db"]
    with open_store(path, "typed", core_tokens=1, max_tokens=3, index=BM25) as store:
        assert store.snapshot() == state
        with pytest.raises(OperationError, match="full"):
            store.insert("more")
        store.delete("m2")


def test_restore_and_copies(tmp_path):
    path = tmp_path / "memory.db"
    with open_store(path, "typed", **LIMITS) as store:
        state = filled(store).snapshot()
        copy = store.without(4)
        assert type(copy) is Memory and type(store.empty()) is Memory
        copy.insert("not in the file")
        for text in ("x", "y"):
            store.insert(text)
        with pytest.raises(KeyError):
            store.restore({"core": "", "turn": 0, "next": 0, "entries": [{"id": "m0"}]})
        assert store.get("m3").content == "y"
        store.restore(state)
        assert store.snapshot() == state
    with open_store(path, "typed", **LIMITS) as store:
        assert store.snapshot() == state and store.insert("x").id == "m2"


def test_a_full_disk_changes_nothing(tmp_path):
    store = filled(open_store(tmp_path / "memory.db", "typed", max_content=9999))
    store._db.execute(f"PRAGMA max_page_count = {store._pragma('page_count')}")
    store._db.execute("PRAGMA cache_size = 1")
    state = store.snapshot()
    big = " ".join(f"w{i}" for i in range(3000))
    for operation in (
        lambda: store.insert(big),
        lambda: store.update("m0", big),
        lambda: store.restore(
            {**state, "entries": [{**e, "content": big} for e in state["entries"]]}
        ),
    ):
        with pytest.raises(sqlite3.Error):
            operation()
        assert store.snapshot() == state and [e.id for e in store.search("bern", 2)] == ["m0"]
    store._db.execute("PRAGMA max_page_count = 99999")
    assert store.insert(big).id == "m2"
    store.close()
    with open_store(tmp_path / "memory.db", "typed") as again:
        assert again.get("m2").content == big
    with pytest.raises(sqlite3.Error):
        store.delete("m0")
    assert not store.get("m0").deleted


CHILD = """
import random, sys

def step(store, rng, turn):
    store.turn = turn
    text = " ".join(rng.choices("anna rome oslo tea cake 12".split(), k=rng.randint(1, 9)))
    id = f"m{rng.randrange(store._next + 1)}"
    try:
        pick = rng.random()
        if pick < 0.4:
            store.insert(text, rng.choice(store.kinds), rng.choice([None, "1 May"]))
        elif pick < 0.7:
            store.update(id, text)
        elif pick < 0.9:
            store.delete(id)
        elif pick < 0.95:
            store.rewrite_core(text)
        else:
            store.restore(store.snapshot())
    except ValueError:
        pass

if __name__ == "__main__":
    from mnemic.models.memory.sqlite import open_store
    rng = random.Random(int(sys.argv[2]))
    store = open_store(sys.argv[1], "typed", core_tokens=12, max_tokens=600)
    for turn in range(10**9):
        step(store, rng, turn)
        sys.stdout.write("done\\n")
        sys.stdout.flush()
"""


def test_killed_at_any_instant_it_holds_what_it_acknowledged(tmp_path):
    names: dict = {"__name__": "child"}
    exec(CHILD, names)
    (tmp_path / "child.py").write_text(CHILD)
    rng, acknowledged, ahead = random.Random(0), 0, 0
    mirror, path = make_store("typed", **LIMITS), tmp_path / "0.db"
    for kill in range(24):
        if kill % 6 == 0:  # A new file: the kill may fall into its making.
            mirror, path = make_store("typed", **LIMITS), tmp_path / f"{kill}.db"
        child = subprocess.Popen(
            [sys.executable, str(tmp_path / "child.py"), str(path), str(kill)],
            stdout=subprocess.PIPE,
        )
        assert child.stdout is not None
        lines = 0
        if kill % 3 == 0:
            time.sleep(rng.uniform(0.05, 0.2))
        else:
            for _ in range(rng.randint(1, 60)):
                lines += child.stdout.readline() == b"done\n"
            time.sleep(rng.uniform(0, 0.003))
        child.send_signal(signal.SIGKILL)
        lines += child.stdout.read().count(b"done\n")
        assert child.wait() == -signal.SIGKILL
        child.stdout.close()
        steps = random.Random(kill)
        for turn in range(lines):
            names["step"](mirror, steps, turn)
        with open_store(path, "typed", **LIMITS) as store:
            if contents(store) != contents(mirror):  # One that was done, not yet acknowledged.
                names["step"](mirror, steps, lines)
                ahead += 1
            assert contents(store) == contents(mirror)
            assert store.tokens() == mirror.tokens()
        acknowledged += lines
    assert acknowledged > 300 and ahead < 24


def test_a_second_process_is_refused(tmp_path):
    path = tmp_path / "memory.db"
    code = (
        "import sys; from mnemic.models.memory.sqlite import open_store\n"
        "try: open_store(sys.argv[1], 'flat').insert('theirs')\n"
        "except ValueError as error: print(error)"
    )

    def second():
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
        )
        return done.stdout

    with open_store(path, "flat") as store:
        assert "memory.db is open already" in second()
        store.insert("ours")
        with pytest.raises(ValueError, match="is open already"):
            open_store(path, "flat")
        assert "is open already" in second(), "the lock outlives a refused attempt of our own"
        store.insert("ours too")
    assert second() == ""
    with open_store(path, "flat") as store:
        assert [e.content for e in store.entries()] == ["ours", "ours too", "theirs"]


def refusal(path, kind="typed"):
    with pytest.raises(ValueError) as caught:
        open_store(path, kind)
    assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_files_that_are_not_ours_are_refused_and_left_as_they_are(tmp_path):
    text, other, newer = tmp_path / "a.txt", tmp_path / "b.db", tmp_path / "c.db"
    text.write_text("hello " * 3000)
    with sqlite3.connect(other) as db:
        db.execute("CREATE TABLE memory (x)")
    db.close()
    open_store(newer, "typed").close()
    with sqlite3.connect(newer) as db:
        db.execute("PRAGMA user_version = 2")
    db.close()
    before = [p.read_bytes() for p in (text, other, newer)]
    assert "no memory" in refusal(text)
    assert "another program" in refusal(other)
    assert "format 2" in refusal(newer)
    assert "cannot be opened" in refusal(tmp_path)
    assert "cannot be opened" in refusal(tmp_path / "no" / "folder")
    assert [p.read_bytes() for p in (text, other, newer)] == before
    with pytest.raises(ValueError, match="typed, flat, text"):
        open_store(tmp_path / "d.db", "list")  # type: ignore[arg-type]
    assert not (tmp_path / "d.db").exists()


def test_another_kind_is_refused_and_an_empty_file_is_a_new_memory(tmp_path):
    path = tmp_path / "memory.db"
    path.touch()
    open_store(path, "flat").close()
    assert "holds a 'flat' memory, not 'typed'" in refusal(path)
    open_store(path, "flat").close()


def test_damage_is_refused_or_harmless(tmp_path):
    path = tmp_path / "memory.db"
    with open_store(path, "typed") as store:
        for i in range(300):
            store.insert(f"fact number {i} of a memory with some pages")
        state = store.snapshot()
    whole = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for case in range(40):
        damaged = bytearray(whole)
        if case % 2:
            del damaged[rng.randrange(1, len(whole)) :]
        else:
            at = rng.randrange(0, len(whole) - 400)
            damaged[at : at + 400] = rng.randbytes(400)
        path.write_bytes(damaged)
        try:
            # Random bytes within a text are a text: SQLite keeps no checksums.
            with open_store(path, "typed") as store:
                assert len(store.history()) == len(state["entries"]), case
        except ValueError as error:
            assert str(path) in str(error) and len(str(error).splitlines()) == 1
            refused += 1
    assert refused > 30
    # A list of free pages that is not there: nothing that loading would stumble on.
    path.write_bytes(whole[:36] + (5).to_bytes(4, "big") + whole[40:])
    assert "damaged" in refusal(path)
    path.write_bytes(whole)
    db = sqlite3.connect(path)
    db.execute("UPDATE entries SET content = x'00' WHERE number = 3")
    db.commit()
    db.close()
    assert "damaged" in refusal(path)
    db = sqlite3.connect(path)
    db.execute("DELETE FROM memory")
    db.commit()
    db.close()
    assert "damaged" in refusal(path)
