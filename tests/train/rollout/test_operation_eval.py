"""Measures of the memory operations, each against values worked out by hand."""

import json

import numpy as np
import pytest

from mnemic.models.memory import make_store
from mnemic.models.memory.pipeline import Retained, apply_update
from mnemic.train.data.memory.episode import EpisodeRow, Question
from mnemic.train.rollout.operation_eval import (
    Call,
    ExtractScores,
    OpTurn,
    answer_scores,
    extract_figures,
    extract_scores,
    from_json,
    matched,
    record,
    same,
    update_figures,
    update_scores,
)
from mnemic.train.rollout.paired import difference, f1_of, mean_of
from mnemic.train.rollout.pipeline_suite import Outcome

CHUNK = "Anna: I moved to Oslo last week.\nBob: Nice! My cat Tom is ill."


def turn(facts, calls=(), shown=(), chunk=CHUNK, index=0, date=None, extracted=None):
    text = json.dumps(facts) if extracted is None else extracted
    return OpTurn(index, chunk, date, text, list(facts), list(shown), "", list(calls))


def insert(content, error=None):
    return Call("insert", None, content, error)


def test_facts_are_the_same_by_half_of_their_content_words():
    # {anna, lives, oslo} and {anna, moved, oslo}: 2 of 3 on both sides.
    assert same("Anna lives in Oslo", "Anna moved to Oslo") == pytest.approx(2 / 3)
    assert same("the cat", "of the") == 0
    # One gold fact is met by one fact, the closest; the other is too many.
    assert matched(["Anna lives in Oslo", "Anna moved to Oslo"], ["Anna moved to Oslo"]) == 1
    assert matched(["a red car", "a blue bike"], ["the blue bike", "one red car"]) == 2


def test_extraction_counts_by_chunk_and_rates_over_all():
    gold = [["Anna moved to Oslo", "Bob's cat is ill"], ["Cid sings"]]
    turns = [
        turn(["Anna moved to Oslo", "Bob owns a yacht"]),
        turn(["Anna moved to Oslo."], extracted='["Anna moved to Oslo."] as I said'),
        turn([], chunk="Cid: I sing.", index=1, extracted="nothing"),
    ]
    one, two = extract_scores(turns, 2, gold)
    # The repetition in a second part of the chunk is the same fact.
    assert (one.said, one.gold, one.matched, one.exact, one.replies, one.valid) == (
        2,
        2,
        1,
        1,
        2,
        1,
    )
    assert (two.said, two.gold, two.matched, two.fabricated, two.valid) == (0, 1, 0, 0, 0)
    assert one.fabricated == 1  # a yacht is in neither
    found = extract_figures([one, two])
    assert found["json_valid"] == pytest.approx(1 / 3) and found["facts_per_chunk"] == 1
    assert found["precision"] == 0.5 and found["recall"] == pytest.approx(1 / 3)
    assert found["f1"] == found["exact_f1"] == pytest.approx(0.4)
    assert found["fabrication"] == 0.5 and found["omission"] == pytest.approx(2 / 3)
    # Best word F1: said 1 and {bob, owns, yacht}~{bob, cat, ill} 1/3; gold 1, 1/3, 0.
    precision, recall = (1 + 1 / 3) / 2, (1 + 1 / 3) / 3
    soft = 2 * precision * recall / (precision + recall)
    assert found["soft_f1"] == pytest.approx(soft)


def test_a_fact_with_the_date_or_like_gold_is_not_made_up_and_unknown_gold_gives_no_rate():
    dated = turn(["Anna moved to Oslo in May 2023"], date="7 May, 2023")
    assert extract_scores([dated], 1, None)[0].fabricated == 0
    assert extract_scores([turn(["Anna moved to Oslo in May 2023"])], 1, None)[0].fabricated == 1
    by_gold = extract_scores([turn(["anna city none"])], 1, [["anna city none"]])[0]
    assert by_gold.fabricated == 0
    found = extract_figures(extract_scores([dated], 1, None))
    assert found["precision"] is found["f1"] is found["omission"] is found["soft_f1"] is None
    silent = extract_figures(extract_scores([turn([])], 1, [["Anna sings"]]))
    assert silent["precision"] is None and silent["f1"] == silent["soft_f1"] == 0
    assert found["fabrication"] == 0 and extract_figures([])["json_valid"] is None


def test_calls_of_an_update_are_counted_by_what_became_of_them():
    one = turn(
        ["Anna lives in Oslo", "Bob's cat is ill"],
        [
            insert("Anna lives in Oslo"),
            Call("update", "m0", "Dora flies to Mars", None),
            Call("delete", "m9", None, "there is no 'm9' in view"),
            Call(None, None, None, "not an operation"),
        ],
        [("m0", "Dora flies kites")],
    )
    found = update_figures([update_scores(one), update_scores(turn([]))])
    assert found["readable"] == 0.75 and found["refused"] == pytest.approx(1 / 3)
    shares = [found[f"share_{name}"] for name in ("insert", "update", "delete", "noop")]
    assert shares == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    # {dora, flies, mars}: two of three words are an old entry's, under three quarters.
    assert found["fabrication"] == 0.5 and found["omission"] == 0.5
    assert found["operation_accuracy"] is None and found["id_accuracy"] is None


def test_a_fact_is_not_omitted_where_an_entry_holds_it_and_stays():
    shown = [("m0", "Anna lives in Oslo with two dogs, her sister and a garden")]
    kept = update_scores(turn(["Anna lives in Oslo"], [Call("noop", None, None, None)], shown))
    gone = update_scores(turn(["Anna lives in Oslo"], [Call("delete", "m0", None, None)], shown))
    over = update_scores(
        turn(["Anna lives in Oslo"], [Call("update", "m0", "Bob sings", None)], shown)
    )
    refused = update_scores(turn(["Bob sings"], [insert("Bob sings", "the memory is full")]))
    assert (kept.omitted, gone.omitted, over.omitted, refused.omitted) == (0, 1, 1, 1)


@pytest.mark.parametrize(
    ("fact", "calls", "right", "id_right"),
    [
        # There are m0 `anna city rome` and m1 `bob pet cat`; ids of the store.
        ("anna city oslo", [Call("update", "m0", "anna city oslo", None)], (1, 1, 1), 1),
        ("anna city oslo", [Call("update", "m1", "anna city oslo", None)], (1, 0, 1), 0),
        ("anna city oslo", [insert("anna city oslo")], (0, 0, 1), 0),
        ("anna city oslo", [], (0, 0, 1), 0),
        ("anna city none", [Call("delete", "m0", None, None)], (1, 1, 1), 1),
        ("anna city none", [Call("delete", "m1", None, None)], (0, 0, 1), 0),
        ("anna city rome", [Call("noop", None, None, None)], (1, 1, 0), 0),
        ("anna city rome", [insert("anna city rome")], (0, 0, 0), 0),
        ("dana food rice", [insert("dana food rice")], (1, 1, 0), 0),
        ("dana food rice", [insert("dana food bread")], (1, 0, 0), 0),
        ("dana food none", [], (1, 1, 0), 0),
    ],
)
def test_operations_of_a_generated_stream_are_held_against_gold(fact, calls, right, id_right):
    shown = [("m0", "anna city rome"), ("m1", "bob pet cat")]
    key = fact.rsplit(" ", 1)[0]
    found = update_scores(turn([fact], calls, shown), [key, "bob pet"], [fact])
    assert found.gold == 1 and found.given == (not fact.endswith("none"))
    assert (found.op_right, found.all_right, found.with_id) == right
    assert found.id_right == id_right
    # A fact that is no gold one has no right operation.
    assert update_scores(turn([fact], calls, shown), [key], ["eve job cook"]).gold == 0


def test_two_calls_on_one_key_are_right_only_if_both_are():
    calls = [Call("update", "m0", "anna city oslo", None), insert("anna city oslo")]
    found = update_scores(
        turn(["anna city oslo"], calls, [("m0", "anna city rome")]), ["anna city"],
        ["anna city oslo"],
    )  # fmt: skip
    assert (found.op_right, found.id_right, found.all_right) == (0, 0, 0)


def test_a_turn_is_recorded_with_the_ids_of_the_store_and_survives_json():
    store = make_store("flat")
    for content in ("a one", "b two", "c three"):
        store.insert(content)
    shown = [store.entries()[1], store.entries()[2]]
    result = apply_update(store, "= m0 b five\n= m1 c three\n- m7\n+ d six\nhm", shown)
    retained = Retained(
        "x", "[]", ["d six"], shown, "", result.applied, result.changes, index=3
    )  # fmt: skip
    found = record(retained, "May")
    assert [(c.name, c.id, c.error is None) for c in found.calls] == [
        ("update", "m1", True), ("update", "m2", False), ("delete", None, False),
        ("insert", "m3", True), (None, None, False),
    ]  # fmt: skip
    assert found.index == 3 and found.shown == [("m1", "b two"), ("m2", "c three")]
    outcome = Outcome("base", [["x"]], [[found]], {"mem_extract": {"calls": 1}})
    again = Outcome.from_json(json.loads(json.dumps(outcome.to_json())))
    assert again == outcome
    assert from_json(json.loads(json.dumps(outcome.to_json()))["turns"][0][0]) == found


def test_answers_are_marked_by_the_data_s_metric_and_by_all_others():
    row = EpisodeRow(
        "a", "t", ("x",),
        (Question("q", ("red old car",)), Question("q", ("none",), "adversarial")), "locomo",
    )  # fmt: skip
    first, second = answer_scores(row, ["a red car", "not mentioned"])
    assert first["score"] == first["f1"] == pytest.approx(0.8) and first["em"] == 0
    assert first["rouge_l"] == pytest.approx(2 / 3)  # lcs "red car" of 3 ("a" counts) and 3
    assert set(second.values()) == {1.0}


def test_the_paired_difference_is_exact_for_a_constant_gain_and_wide_for_noise():
    found = difference([[0.75]] * 8, [[0.5]] * 8, mean_of)
    assert found == {"mean": 0.25, "low": 0.25, "high": 0.25}
    rng = np.random.default_rng(1)
    ours, theirs = rng.random(400), rng.random(400)
    found = difference(ours[:, None].tolist(), theirs[:, None].tolist(), mean_of)
    assert found is not None
    gain = ours - theirs
    assert found["mean"] == pytest.approx(gain.mean())
    # The normal approximation of the paired interval.
    half = 1.96 * gain.std() / 20
    assert found["low"] == pytest.approx(gain.mean() - half, abs=0.004)
    assert found["high"] == pytest.approx(gain.mean() + half, abs=0.004)
    assert difference([[1.0]], [[0.0]], mean_of) is None


def test_extraction_differs_by_its_pooled_f1():
    # Pooled: 2 * 3 / (4 + 6) = 0.6 against 2 * 1 / (4 + 6) = 0.2.
    ours = [[2, 2, 3], [1, 2, 3]]
    theirs = [[1, 2, 3], [0, 2, 3]]
    found = difference(ours, theirs, f1_of)
    assert found is not None and found["mean"] == pytest.approx(0.4)
    total = ExtractScores(matched=2, judged=2, gold=3) + ExtractScores(matched=1, judged=2, gold=3)
    assert extract_figures([total])["f1"] == pytest.approx(0.6)
