"""Gold rows of operations: right by the stream's own answers, as the pipeline asks, and never in
both splits.
"""

import json
import re
from dataclasses import replace

import pytest

from mnemic.models.memory import make_store
from mnemic.models.memory.op_prompts import EXTRACT, GENERATE, OPERATIONS, UPDATE, parse_facts
from mnemic.models.memory.op_writer import Reply
from mnemic.models.memory.pipeline import MemoryPipeline
from mnemic.models.memory.syntax import Lines
from mnemic.train.data.memory.episode import EpisodeRow, Question
from mnemic.train.data.memory.kvstream import episode
from mnemic.train.data.memory.kvstream_wide import WORDING
from mnemic.train.data.memory.kvstream_words import NATURAL
from mnemic.train.data.memory.operations_rows import (
    STREAM,
    mixed_rows,
    operation_rows,
    split_rows,
)
from mnemic.train.data.memory.rows import kv_stream
from mnemic.train.data.rows import Row
from mnemic.train.data.sources import open_source
from mnemic.train.recipe.data import OperationsData

ROW = EpisodeRow(
    "r", "test",
    ("Anna lives in Rome.\nIt rained.\nBob got a cat.", "Anna lives in Rome.\nBob sold the cat.",
     "Time flies.", "Anna moved to Oslo.\nCarl got a cat."),
    (Question("What is Anna's city?", ("oslo",), "updated"),
     Question("What is Bob's pet?", ("none",), "abstain"),
     Question("What was Anna's city before?", ("rome",), "previous"),
     Question("What is Carl's pet?", ("cat",), "current")),
    gold=(
        ({"op": "insert", "key": "anna city", "content": "anna city rome"},
         {"op": "noise", "content": "It rained."},
         {"op": "insert", "key": "bob pet", "content": "bob pet cat"}),
        ({"op": "repeat", "key": "anna city"}, {"op": "delete", "key": "bob pet"}),
        ({"op": "noise", "content": "Time flies."},),
        ({"op": "update", "key": "anna city", "content": "anna city oslo"},
         {"op": "insert", "key": "carl pet", "content": "carl pet cat"}),
    ),
)  # fmt: skip


def completions(op: str, row: EpisodeRow = ROW) -> list[str]:
    return [r["completion"][0]["content"] for r in operation_rows(row, op, vary=False)]


def test_targets_follow_the_steps():
    assert completions(EXTRACT) == [
        '["Anna city rome", "Bob pet cat"]', '["Anna city rome", "Bob pet none"]', "[]",
        '["Anna city oslo", "Carl pet cat"]',
    ]  # fmt: skip
    assert completions(UPDATE) == [
        "+ Anna city rome\n+ Bob pet cat", "- m1", "= m0 Anna city oslo\n+ Carl pet cat",
    ]  # fmt: skip
    assert completions(GENERATE) == ["oslo", "none", "cat"]
    rows = list(operation_rows(ROW, UPDATE, vary=False))
    assert (
        "m0 Anna city rome\nm1 Bob pet cat\nNew facts:\n- Anna city rome\n- Bob pet none"
        in (rows[1]["prompt"][0]["content"])
    )
    assert all(row["operation"] == UPDATE for row in rows)


def test_a_chunk_that_corrects_itself_says_what_it_ends_with():
    steps = (*ROW.gold[0], {"op": "update", "key": "anna city", "content": "anna city oslo"})
    row = EpisodeRow("r", "test", ("...",), (), "em", (steps,))
    assert completions(EXTRACT, row) == ['["bob pet cat", "anna city oslo"]']
    assert completions(UPDATE, row) == ["+ bob pet cat\n+ anna city oslo"]


def test_a_fact_that_the_view_lacks_is_none():
    row = EpisodeRow("r", "test", ROW.chunks, (Question("Who?", ("oslo",), "current"),), "em",
                     ROW.gold)  # fmt: skip
    assert completions(GENERATE, row) == ["none"]


class Table:
    """Answers from gold rows, by the exact prompt."""

    def __init__(self, row: EpisodeRow) -> None:
        self.known = {
            json.dumps(made["prompt"]): made["completion"][0]["content"]
            for op in OPERATIONS for made in operation_rows(row, op, vary=False)
        }  # fmt: skip

    def write(self, operation, conversations):
        return [Reply(self.known[json.dumps(messages)]) for messages in conversations]

    def room(self, operation, messages):
        return None


def test_the_pipeline_asks_exactly_these_prompts_and_gold_makes_it_right():
    for index in range(8):
        row = episode(STREAM, "heldout", index)
        pipeline = MemoryPipeline(Table(row), None, make_store("flat"))
        pipeline.retain(row.chunks)
        held = {}
        for step in (step for steps in row.gold for step in steps):
            if step["op"] in ("insert", "update"):
                held[step["key"]] = step["content"].capitalize()
            elif step["op"] == "delete":
                del held[step["key"]]
        assert sorted(held.values()) == sorted(e.content for e in pipeline.store.entries())
        asked = [q for q in row.questions if q.type in ("current", "updated", "abstain")]
        answers = pipeline.reflect([q.q for q in asked])
        assert answers == [q.answers[0] for q in asked]
        assert not any(pipeline.errors.values())


@pytest.mark.parametrize("op", OPERATIONS)
def test_splits_share_no_prompt_and_no_prompt_comes_twice(op):
    made = {
        split: [(json.dumps(r["prompt"]), r["completion"][0]["content"])
                for r in split_rows(op, split, 150)]
        for split in ("train", "heldout")
    }  # fmt: skip
    prompts = {split: {prompt for prompt, _ in rows} for split, rows in made.items()}
    assert len(prompts["train"]) == len(prompts["heldout"]) == 150
    assert not prompts["train"] & prompts["heldout"]
    assert made["train"] == [
        (json.dumps(r["prompt"]), r["completion"][0]["content"])
        for r in split_rows(op, "train", 150)
    ]
    targets = [target for rows in made.values() for _, target in rows]
    if op == EXTRACT:
        assert all(parse_facts(target)[1] is None for target in targets)
    elif op == UPDATE:
        calls = [call for target in targets for call in Lines().parse(target)]
        kinds = {call.operation.name for call in calls if call.operation is not None}
        for prompt, _ in made["train"]:
            shown = re.findall(r"m\d+ (\w+ \w+) \w+", json.loads(prompt)[0]["content"])
            assert len(shown) == len(set(shown)), "the memory says two things of one"
        assert kinds == {"insert", "update", "delete", "noop"} and all(c.ok for c in calls)
    else:
        assert 0.1 < targets.count("none") / len(targets) < 0.6


def test_what_cannot_be_made_is_said():
    with pytest.raises(ValueError, match="an operation is one of mem_extract"):
        list(operation_rows(ROW, "extract"))
    with pytest.raises(ValueError, match="has no gold operations"):
        list(operation_rows(EpisodeRow("x", "t", ("a",), ()), EXTRACT))
    from dataclasses import replace

    with pytest.raises(ValueError, match="only natural and wide streams"):
        list(split_rows(EXTRACT, "heldout", 5, stream=replace(STREAM, style="plain")))
    small = replace(STREAM, n_entities=1, n_attributes=1, n_chunks=1, questions=1)
    with pytest.raises(ValueError, match="different prompts of mem_generate"):
        list(split_rows(GENERATE, "heldout", 10**4, stream=small))


def test_wide_training_words_are_many_and_none_is_held_out():
    held, trained = set(), set()
    for split, found in (("heldout", held), ("train", trained)):
        for index in range(60):
            row = episode(STREAM, split, index)
            for step in (step for steps in row.gold for step in steps):
                if "content" in step and step["op"] != "noise":
                    entity, _, value = step["content"].split()
                    found |= {entity, value}
                elif step["op"] == "noise":
                    found.add(step["content"])
    assert len(trained) > 4 * len(held) and not trained & held


@pytest.mark.parametrize("kind", ["states", "changes", "retracts"])
def test_wide_sentences_are_others_than_the_held_out_ones(kind):
    for attribute, held in getattr(NATURAL["heldout"], kind).items():
        trained = getattr(WORDING, kind)[attribute]
        assert len(set(trained)) == len(trained) and not set(held) & set(trained)
        assert all("{e}" in text and "{v}" in text for text in trained) or attribute == "label"


def test_rows_of_several_operations_take_turns():
    rows = mixed_rows([UPDATE, EXTRACT], "train", 3)
    assert [row["operation"] for row in rows] == [UPDATE, EXTRACT] * 3
    assert rows[1::2] == list(split_rows(EXTRACT, "train", 3))


def test_the_recipes_stream_is_the_benchmarks_and_its_knobs_reach_the_rows():
    default = OperationsData()
    assert kv_stream(default.stream) == STREAM
    few = OperationsData.model_validate(
        {"operations": [UPDATE], "size": 40, "stream": {"n_entities": 1, "p_update": 0.6}}
    )
    rows = [row.fields for row in open_source(few).read(None) if isinstance(row, Row)]
    assert rows == list(split_rows(UPDATE, "train", 40, stream=kv_stream(few.stream)))
    assert kv_stream(few.stream) == replace(STREAM, n_entities=1, p_update=0.6)
