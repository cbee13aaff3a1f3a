"""The pipeline: every stage goes on exactly from any state, and passes are whole."""

import copy
import json
from collections import Counter
from itertools import chain

import pytest
from support import lm_tree, sft_tree

from mnemic.models.tiny import byte_tokenizer
from mnemic.train.data.rows import BadRows
from mnemic.train.data.sources import ListSource
from mnemic.train.data.stream import (
    EPOCH_END,
    Concat,
    Map,
    Reader,
    count_pass,
    one_pass,
    shuffled,
    take,
)
from mnemic.train.objectives.build import train_stream
from mnemic.train.recipe.load import build_recipe


def numbers(count=23):
    source = ListSource([{"n": i} for i in range(count)], "numbers")
    return Map(Reader(source, BadRows("stop")), lambda row: row.fields["n"])


def lists():
    return Map(numbers(), lambda n: [n] * (n % 5 + 1))


STAGES = {
    "reader": numbers,
    "shuffled": lambda: shuffled(numbers(), 7, seed=1),
    "shuffled-whole": lambda: shuffled(numbers(), 1000, seed=1),
    "concat": lambda: Concat(lists(), 4),
    "concat-flush": lambda: Concat(lists(), 4, flush=True),
    "shuffled-concat": lambda: shuffled(Concat(lists(), 4), 5, seed=2),
}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_goes_on_from_any_state(name):
    stage = STAGES[name]()
    states, items = [], []
    for _ in range(80):
        # Through JSON: a state is plain numbers and lists, and later steps must not change it.
        states.append(json.dumps(stage.state_dict()))
        items.append(next(stage))
    for index in range(0, 80, 3):
        fresh = STAGES[name]()
        fresh.load_state_dict(json.loads(states[index]))
        assert [next(fresh) for _ in range(80 - index)] == items[index:]


def test_shuffling_permutes_each_pass_anew():
    stage = shuffled(numbers(), 1000, seed=3)
    first, second = one_pass(stage), one_pass(stage)
    assert sorted(first) == sorted(second) == list(range(23))
    assert first != second and first != sorted(first)
    assert one_pass(shuffled(numbers(), 1000, seed=3)) == first
    assert one_pass(shuffled(numbers(), 1000, seed=4)) != first


def test_take_crosses_passes_and_counts_every_row():
    assert Counter(take(numbers(), 46)) == Counter(list(range(23)) * 2)
    assert count_pass(numbers()) == 23


def test_concat_loses_no_token():
    stage = Concat(lists(), 4)
    rows = take(stage, 40)
    assert all(len(row) == 4 for row in rows)
    flat = [t for row in rows for t in row]
    expected = [t for item in take(lists(), 200) for t in item]
    assert flat == expected[: len(flat)]
    flushed = one_pass(Concat(lists(), 4, flush=True))
    assert list(chain(*flushed)) == list(chain(*one_pass(lists())))


def test_held_out_rows_are_disjoint_and_complete():
    def part(held):
        source = ListSource([{"n": i} for i in range(23)], "numbers")
        reader = Reader(source, BadRows("stop"), nth=5, held=held)
        return [row.fields["n"] for row in one_pass(reader)]

    assert part(True) == [4, 9, 14, 19]
    assert sorted(part(True) + part(False)) == list(range(23))


@pytest.mark.parametrize("make", [lm_tree, sft_tree])
@pytest.mark.parametrize("packing", [False, True])
def test_the_recipes_streams_go_on_from_any_state(tmp_path, make, packing):
    changes = {"objective": {"packing": True}} if packing and make is sft_tree else {}
    recipe = build_recipe(make(tmp_path, **changes))
    tokenizer = byte_tokenizer()
    stream = train_stream(recipe, tokenizer).stream
    states, items = [], []
    for _ in range(150):
        states.append(copy.deepcopy(stream.state_dict()))
        items.append(next(stream))
    assert EPOCH_END in items or make is lm_tree
    for index in (0, 1, 49, 50, 51, 77, 149):
        fresh = train_stream(recipe, tokenizer).stream
        fresh.load_state_dict(states[index])
        assert [next(fresh) for _ in range(150 - index)] == items[index:]
