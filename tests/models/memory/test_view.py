"""What is shown: within its budget, old entries that matter among it, ids exactly those shown."""

import re

import pytest

from mnemic.models.memory.store import Memory
from mnemic.models.memory.stores import make_store
from mnemic.models.memory.view import ViewPolicy, show_for


def ids_of(text):
    return set(re.findall(r"^(m\d+) ", text, re.MULTILINE))


def long_store():
    store = make_store("typed")
    store.insert("anna lives in rome")
    for i in range(60):
        store.turn = i + 1
        store.insert(f"weather of day {i} was fine", store.kinds[i % 2], f"day {i}")
    store.rewrite_core("the user likes tea")
    return store


def test_an_old_entry_that_the_text_is_about_is_shown():
    view = ViewPolicy(retrieved=4, recent=3).render(long_store(), "Anna moved to Oslo.")
    assert "m0 anna lives in rome" in view.text.splitlines()
    assert view.ids == {"m0", "m58", "m59", "m60"} == ids_of(view.text)
    alone = ViewPolicy(retrieved=4, recent=0).render(long_store(), "Anna moved to Oslo.")
    assert alone.ids == {"m0"}


def test_what_was_touched_last_is_recent_and_what_is_deleted_is_not():
    store = long_store()
    store.turn = 99
    store.update("m7", "weather of day 6 was foul")
    store.delete("m60")
    assert ViewPolicy(retrieved=0, recent=2).render(store, "x").ids == {"m7", "m59"}
    assert "m60" not in ViewPolicy(retrieved=9, recent=9).render(store, "day 59").ids


def test_the_text_in_full():
    store = make_store("typed")
    assert ViewPolicy().render(store, "x").text == "core: "
    store.insert("b", "episodic", "1 May")
    store.insert("a")
    store.insert("c", "episodic")
    store.rewrite_core("d\nm7 e")
    assert ViewPolicy().render(store, "x").text == (
        "core: d m7 e\nsemantic:\nm1 a\nepisodic:\nm0 [1 May] b\nm2 c"
    )
    flat = Memory()
    flat.insert("a")
    assert ViewPolicy().render(flat, "x").text == "m0 a"
    text = make_store("text")
    text.rewrite_core("all of it")
    view = ViewPolicy().render(text, "x")
    assert view.text == "core: all of it" and view.ids == frozenset()


@pytest.mark.parametrize("count", [None, len, lambda t: (len(t) + 2) // 3])
def test_the_budget_holds(count):
    store = long_store()
    if count is not None:
        store.count = count
    core = store.count("core: " + store.core)
    seen = set()
    for budget in range(core, core + 200, 3):
        view = ViewPolicy(8, 8, budget).render(store, "anna weather day 5")
        assert store.count(view.text) <= budget and ids_of(view.text) == view.ids
        seen.add(len(view.ids))
    assert {0, 1, 2, 3} <= seen
    assert ViewPolicy(8, 8, 1).render(store, "anna").ids == frozenset()


def test_the_least_wanted_is_left_out_first():
    store = make_store("flat")
    for text in ("other words", "anna rome", "anna rome tea"):
        store.insert(text)
    policies = [ViewPolicy(2, 3, budget) for budget in (3, 6, 9)]
    shown = [policy.render(store, "anna rome").ids for policy in policies]
    assert shown == [{"m1"}, {"m1"}, {"m1", "m2"}]


def test_an_answerer_reads_all_of_a_small_memory_and_the_nearest_of_a_large_one():
    store = long_store()
    whole = show_for(store, "where is anna", 2, 10_000)
    assert whole.splitlines()[:2] == ["the user likes tea", "- anna lives in rome"]
    assert len(whole.splitlines()) == 1 + len(store.entries())
    some = show_for(store, "does anna live in rome, day 9", 2, 50).splitlines()
    assert len(some) == 3 and some[0] == "the user likes tea" and some[2] == "- anna lives in rome"
    exact = store.count(whole)
    assert show_for(store, "anna", 2, exact) == whole != show_for(store, "anna", 2, exact - 1)
    assert show_for(make_store("typed"), "x", 3, 100) == ""
