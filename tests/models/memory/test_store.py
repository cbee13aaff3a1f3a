"""The store: operations, versions, budgets, and that what is refused changes nothing."""

import json
import random

import pytest

from mnemic.models.memory.bm25 import BM25
from mnemic.models.memory.store import Change, Memory, OperationError, count_pieces
from mnemic.models.memory.stores import make_store


def recount(store: Memory) -> int:
    return sum(store.count(e.text) for e in store.entries()) + store.count(store.core)


def test_entries_keep_what_they_replaced_and_deleted_ones_stay_marked():
    store = Memory()
    store.turn = 1
    assert store.insert("  anna lives\n in rome ").content == "anna lives in rome"
    store.turn = 2
    store.update("m0", "anna lives in oslo")
    store.turn = 3
    store.update("m0", "anna lives in bern")
    store.turn = 4
    gone = store.delete("m0")
    assert gone.previous == [("anna lives in rome", 1), ("anna lives in oslo", 2)]
    assert (gone.turn, gone.written, gone.changed, gone.deleted) == (1, 3, 4, True)
    assert store.entries() == [] and store.history() == [gone] and store.get("m0") == gone
    assert store.search("anna", 3) == [] and store.tokens() == 0
    assert store.insert("anna lives in rome").id == "m1", "an id is never given twice"


def test_the_three_shapes():
    typed, flat, text = (make_store(kind, core_tokens=9) for kind in ("typed", "flat", "text"))
    assert typed.insert("a").kind == "semantic"
    assert typed.insert("a", "episodic", "2024").text == "[2024] a"
    assert flat.insert("a").kind == "fact"
    with pytest.raises(OperationError, match="no core text"):
        flat.rewrite_core("a")
    with pytest.raises(OperationError, match="no entries"):
        text.insert("a")
    text.rewrite_core("one\ntwo")
    text.rewrite_core("three")
    assert text.core_history() == [("one two", 0), ("three", 0)]
    with pytest.raises(ValueError, match="typed, flat, text"):
        make_store("list")  # type: ignore[arg-type]


@pytest.mark.parametrize("end", ["\n", "\r", "\x0b", "\x0c", "\x1c", "\x1e", "\x85", "\u2028"])
def test_no_text_breaks_a_line(end):
    store = make_store("typed")
    store.insert(f"a{end}m9 b", time=f"2024{end}m8 c")
    store.update("m0", f"d{end}m9 e")
    store.rewrite_core(f"core{end}m7 f")
    assert store.entries()[0].text == "[2024 m8 c] d m9 e" and store.core == "core m7 f"


def test_what_is_refused_changes_nothing():
    store = make_store("typed", core_tokens=4, max_tokens=12, max_content=6)
    store.insert("one two three")
    store.insert("four five", "episodic", "2024")
    store.rewrite_core("six seven")
    before, tokens = store.snapshot(), store.tokens()
    refused = {
        "m0 says": lambda: store.insert("one  two three", time=" "),
        "m1 says": lambda: store.insert("four five", "episodic", "2024"),
        "m0 says that": lambda: store.update("m0", "one two three"),
        "'m7'": lambda: store.update("m7", "x"),
        "no 'm8'": lambda: store.delete("m8"),
        "unknown kind 'fact'": lambda: store.insert("x", "fact"),
        "empty": lambda: store.insert(" \n "),
        "at most 6": lambda: store.insert("1 2 3 4 5 6 7"),
        "at most 4": lambda: store.rewrite_core("1 2 3 4 5"),
        "full": lambda: store.insert("1 2 3"),
        "is full": lambda: store.update("m0", "1 2 3 4 5 6"),
        "surrogate": lambda: store.insert("\ud800"),
        "half a": lambda: store.rewrite_core("\udc00"),
    }
    for message, operation in refused.items():
        with pytest.raises(OperationError, match=message):
            operation()
        assert store.snapshot() == before and store.tokens() == tokens == recount(store)
    store.max_tokens = 3  # A limit set later: less is welcome, more is not.
    store.update("m0", "one two")
    with pytest.raises(OperationError, match="full"):
        store.insert("x")


def test_snapshots_go_through_json_and_find_in_the_same_order():
    store = make_store("typed")
    for i in range(9):
        store.insert(f"same words number{i}")
    store.update("m2", "same words again2")
    store.delete("m4")
    store.rewrite_core("a")
    copy = store.empty()
    copy.restore(json.loads(json.dumps(store.snapshot())))
    assert copy.snapshot() == store.snapshot() and copy.tokens() == store.tokens()
    assert [e.id for e in copy.search("same words", 9)] == [e.id for e in store.search("same", 9)]
    assert copy.insert("x").id == store.insert("x").id == "m9"
    before = copy.snapshot()
    with pytest.raises(KeyError):
        copy.restore({k: v for k, v in before.items() if k != "next"})
    assert copy.snapshot() == before


def test_diff_says_what_changed():
    store = make_store("typed")
    for text in "abc":
        store.insert(text)
    before = store.snapshot()
    assert store.diff(before) == []
    store.update("m0", "a2")
    store.delete("m1")
    store.insert("d")
    store.insert("e")
    store.delete("m4")
    store.rewrite_core("core")
    assert store.diff(before) == [
        Change("core", "core", "", "core"),
        Change("update", "m0", "a", "a2"),
        Change("delete", "m1", "b", None),
        Change("insert", "m3", None, "d"),
    ]


def test_without_a_turn_is_as_if_it_had_written_nothing():
    store = make_store("typed")
    store.turn = 1
    for text in ("a", "b", "c", "d"):
        store.insert(text)
    store.rewrite_core("core 1")
    store.turn = 2
    store.insert("new")
    store.update("m0", "a2")
    store.update("m0", "a2 again")  # Twice in one turn.
    store.update("m1", "b2")
    store.delete("m1")  # Changed, then deleted.
    store.delete("m2")
    store.update("m3", "d2")
    store.rewrite_core("core 2")
    store.turn = 3
    store.update("m3", "d3")
    copy = store.without(2)
    assert [(e.id, e.content, e.previous, e.changed) for e in copy.entries()] == [
        ("m0", "a", [], 1), ("m1", "b", [], 1), ("m2", "c", [], 1), ("m3", "d3", [("d", 1)], 3),
    ]  # fmt: skip
    assert copy.core == "core 1" and copy.tokens() == recount(copy)
    assert store.get("m1").deleted and store.core == "core 2", "the store itself is as it was"
    assert store.without(7).snapshot() == store.snapshot()
    assert [e.content for e in store.without(1).history()] == ["new"]


def test_tokens_equal_a_recount_after_random_operations():
    rng = random.Random(0)
    store = make_store("typed", max_tokens=400, core_tokens=30)
    words, done = ["anna", "rome", "oslo,", "pet-cat", "12"], 0
    for turn in range(500):
        store.turn = turn
        text = " ".join(rng.choices(words, k=rng.randint(1, 12)))
        id = f"m{rng.randint(0, 1 + store._next)}"
        operation = rng.choice([
            lambda t=text: store.insert(t, rng.choice(store.kinds), rng.choice([None, "1 May"])),
            lambda t=text, i=id: store.update(i, t),
            lambda i=id: store.delete(i),
            lambda t=text: store.rewrite_core(t),
        ])  # fmt: skip
        try:
            operation()
            done += 1
        except OperationError:
            pass
        assert store.tokens() == recount(store) <= 400
        assert len(store._index) == len(store.entries())
    assert done > 200
    copy = store.empty()
    copy.restore(store.snapshot())
    assert copy.tokens() == store.tokens()


def test_joined_words_are_not_for_free():
    assert count_pieces("Anna, 3 cats.") == 5
    assert count_pieces("anna_lives_in_rome") == 7
    assert count_pieces("a" * 160) == 10 and count_pieces("\u6771\u4eac\u90fd") == 3


def test_an_index_of_ones_own_is_carried_over():
    made = []

    class Noted(BM25):
        def __init__(self):
            super().__init__()
            made.append(self)

    store = Memory(index=Noted)
    store.insert("a")
    copy = store.empty()
    copy.restore(store.snapshot())
    assert isinstance(copy._index, Noted) and len(copy._index) == 1 and len(made) == 3
