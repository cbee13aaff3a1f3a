"""The generator's promises: disjoint splits, no repeats, determinism, scorable targets."""

from __future__ import annotations

import ast
import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from mnemic.train.data import facts
from mnemic.train.data.facts import FACTS_SYSTEM, TABLES, capacity, facts_rows

TRAIN, HELDOUT = TABLES["train"], TABLES["heldout"]
POOLS = ("speakers", "greetings", "asides", "questions", "links")


def turn_and_facts(row: facts.FactsRow) -> tuple[str, list[str]]:
    return row["prompt"][0]["content"], json.loads(row["completion"][0]["content"])


@pytest.mark.parametrize("pool", POOLS)
def test_pools_are_disjoint_and_without_repeats(pool: str) -> None:
    train, heldout = getattr(TRAIN, pool), getattr(HELDOUT, pool)
    assert all(train) and all(heldout)
    assert max(Counter(train + heldout).values()) == 1


def test_values_and_sentences_are_disjoint_across_all_relations() -> None:
    def sides(field: str) -> tuple[set[str], set[str]]:
        return tuple(
            {item for relation in tables.relations for item in getattr(relation, field)}
            for tables in (TRAIN, HELDOUT)
        )  # type: ignore[return-value]

    for field in ("values", "sentences"):
        train, heldout = sides(field)
        assert not train & heldout, field
    # A pair could be new with an old second part: the value itself, in any relation, must be new
    # too, and nobody who is a speaker or a relative in one split is either in the other.
    train_values = {value for relation in TRAIN.relations for _, value in relation.values}
    held_values = {value for relation in HELDOUT.relations for _, value in relation.values}
    assert not (train_values | set(TRAIN.speakers)) & (held_values | set(HELDOUT.speakers))


def test_splits_share_relations_and_nothing_is_named_after_its_speaker() -> None:
    assert [r.target for r in TRAIN.relations] == [r.target for r in HELDOUT.relations]
    assert len(TRAIN.relations) >= 10
    for tables in (TRAIN, HELDOUT):
        values = {value for relation in tables.relations for _, value in relation.values}
        assert not values & set(tables.speakers)  # "Tom is married to Tom"
        for relation in tables.relations:
            assert len(set(relation.sentences)) == len(relation.sentences) >= 4
            assert all("{v}" in sentence for sentence in relation.sentences)
            has_kind = {bool(kind) for kind, _ in relation.values}
            assert has_kind == {True} or "{k}" not in relation.target + "".join(relation.sentences)


def test_rows_differ_within_and_across_splits() -> None:
    turns = Counter(
        turn_and_facts(row)[0]
        for split, size, seed in (("train", 3000, 0), ("heldout", 1000, 0))
        for row in facts_rows(split, size, seed)
    )
    assert max(turns.values()) == 1
    train = {turn_and_facts(row)[0] for seed in range(3) for row in facts_rows("train", 2000, seed)}
    held = {turn_and_facts(row)[0] for seed in range(3) for row in facts_rows("heldout", 500, seed)}
    assert not train & held


def test_same_arguments_same_rows_and_longer_lists_extend_shorter_ones() -> None:
    rows = facts_rows("train", 50, seed=3)
    assert rows == facts_rows("train", 50, seed=3)
    assert rows == facts_rows("train", 120, seed=3)[:50]
    assert rows != facts_rows("train", 50, seed=4)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_target_is_a_json_list_about_the_speaker_and_the_turn(split: str) -> None:
    tables, counts = TABLES[split], Counter[int]()
    for row in facts_rows(split, 800):
        assert [message["role"] for message in row["prompt"] + row["completion"]] == [
            "user",
            "assistant",
        ]
        turn, found = turn_and_facts(row)
        speaker, said = turn.split(": ", 1)
        assert speaker in tables.speakers
        assert "{" not in turn and "  " not in turn and said[0].isupper()
        assert isinstance(found, list) and all(isinstance(fact, str) for fact in found)
        counts[len(found)] += 1
        for fact in found:
            assert fact.startswith((f"{speaker} ", f"{speaker}'s "))
            assert "{" not in fact
            mentioned = [v for r in tables.relations for _, v in r.values if fact.endswith(v)]
            assert any(value.lower() in said.lower() for value in mentioned)
    assert set(counts) == {0, 1, 2}
    assert 0.2 < counts[0] / 800 < 0.4 and counts[1] > counts[2] > 100


def test_unknown_split_and_impossible_sizes_are_refused_with_the_limit() -> None:
    with pytest.raises(ValueError, match="train, heldout"):
        facts_rows("test", 1)
    with pytest.raises(ValueError, match=str(capacity("heldout"))):
        facts_rows("heldout", capacity("heldout") + 1)
    with pytest.raises(ValueError, match="-1"):
        facts_rows("train", -1)
    assert facts_rows("train", 0) == []


def test_the_whole_heldout_capacity_can_be_drawn() -> None:
    rows = facts_rows("heldout", capacity("heldout"))
    assert len({turn_and_facts(row)[0] for row in rows}) == capacity("heldout")


def test_module_needs_only_the_standard_library() -> None:
    tree = ast.parse(Path(facts.__file__).read_text())
    names = {
        (node.module if isinstance(node, ast.ImportFrom) else alias.name).split(".")[0]  # type: ignore[union-attr]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert names <= set(sys.stdlib_module_names)
    assert len(FACTS_SYSTEM.split()) < 30
