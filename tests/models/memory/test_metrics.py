"""Metrics: what counts as right, and the traps where a wrong or empty answer would earn a score."""

import random

import pytest

from mnemic.models.memory.metrics import METRICS, abstains, lcs, score


@pytest.mark.parametrize(
    ("metric", "prediction", "golds", "expected"),
    [
        # SQuAD's normal form: case, articles, punctuation.
        ("em", "the Eiffel Tower.", ["Oslo", "eiffel tower"], 1),
        ("em", "Eiffel", ["Eiffel Tower"], 0),
        # "A" normalises to nothing: an empty answer must not score, nor count as one.
        ("em", "", ["A"], 0),
        ("em", "a", ["A"], 1),
        ("sub_em", "anything at all", ["?"], 0),
        ("sub_em", "", ["the"], 0),
        ("f1", "", ["Rome"], 0),
        # tokens: said {red, car}, gold {red, old, car}: P 1, R 2/3.
        ("f1", "a red car", ["the red old car"], 0.8),
        ("f1", "red red car", ["red bus"], 0.4),
        ("f1", "bus", ["car", "red bus"], 2 / 3),
        ("sub_em", "She moved to Rome, I think", ["rome"], 1),
        ("sub_em", "Romeo and Juliet", ["Rome"], 0),
        ("sub_em", "New, the York", ["New York"], 1),
        ("keyword_hit", "A red car and a dog", ["red car; dog; cat; "], 2 / 3),
        ("keyword_hit", "dogs", ["dog"], 0),
        ("number", "The label is 7.", ["7"], 1),
        ("number", "7.0", ["7"], 1),
        ("number", "1,234", ["1234"], 1),
        ("number", "-3", ["3"], 0),
        ("number", "either 3 or 7", ["7"], 0),
        ("number", "17", ["7"], 0),
        ("number", "m7, the 7th of 2.7.1", ["7"], 0),
        ("number", r"3 of 5 say so: \boxed{1}, no, \boxed{ 7 }", ["7"], 1),
        ("number", r"7, so \boxed{}", ["7"], 0),
        ("number", "label", ["7"], 0),
        # lcs "police the gunman" of 4 and 4 words; of both orders only one keeps it.
        ("rouge_l", "police ended the gunman", ["police killed the gunman"], 0.75),
        ("rouge_l", "the gunman killed police", ["police killed the gunman"], 0.5),
        ("rouge_l", "", ["x"], 0),
        # Six words in one run: 1 - 0.5 / 6^3. In three ("on the mat", "the cat", "sat"): 1 - 1/16.
        ("meteor", "The cat sat on the mat.", ["the cat sat on the mat"], 1 - 0.5 / 216),
        ("meteor", "on the mat sat the cat", ["the cat sat on the mat"], 0.9375),
        # P 1, R 2/3: Fmean (20/3) / (29/3); one run of two words: 1 - 1/16.
        ("meteor", "the cat", ["dog", "the cat sat"], 20 / 29 * 0.9375),
        # P 1/2, R 1: Fmean 5 / 5.5; a single word is a run of its own: 1 - 0.5.
        ("meteor", "in Rome", ["rome"], 5 / 5.5 * 0.5),
        ("meteor", "red red", ["red"], 5 / 5.5 * 0.5),
        ("meteor", "", ["x"], 0),
    ],
)
def test_what_an_answer_earns(metric, prediction, golds, expected):
    assert score(metric, prediction, golds) == pytest.approx(expected)


@pytest.mark.parametrize("answer", ["", " . ", "None", "unknown.", "Not mentioned", "I don't know",
                                    "There is no information available."])  # fmt: skip
def test_the_gold_none_is_met_by_abstaining_in_every_metric(answer):
    assert abstains(answer)
    for metric in METRICS:
        assert score(metric, answer, ["none"]) == 1, metric
        assert score(metric, answer, ["Rome"]) == 0, metric


def test_a_hedge_behind_an_answer_earns_nothing_and_a_plain_no_is_an_answer():
    for metric in ("em", "f1", "sub_em", "number"):
        assert score(metric, "Rome, or not mentioned", ["none"]) == 0
    for answer in ("no", "A", "7"):
        assert not abstains(answer) and score("em", answer, ["none"]) == 0


def test_locomo_scores_each_category_as_the_benchmark_does():
    # Multi-hop: the mean over gold parts of the best part of the answer: (1 + 2/3 + 0) / 3.
    gold = ["swimming, red pottery, camping"]
    assert score("locomo", "pottery, swimming", gold, "multi_hop") == pytest.approx(5 / 9)
    # Any other: one bag of words, "and" being an article and commas no part of a number.
    assert score("locomo", "pottery, swimming", gold, "single_hop") == pytest.approx(2 / 3)
    assert score("locomo", "1,000 and", ["1000"], "temporal") == 1
    assert score("f1", "pottery and", ["pottery"]) < 1
    # Open domain: the gold ends at its first semicolon.
    assert score("locomo", "likely no", ["Likely no; she is busy"], "open_domain") == 1
    assert score("locomo", "likely no", ["Likely no; she is busy"], "single_hop") < 1
    # Adversarial: right by saying so, also inside a sentence, whatever the gold.
    for gold in (["none"], ["A bowl"]):
        said = "There is no information available on that."
        assert score("locomo", said, gold, "adversarial") == 1
        assert score("locomo", "A bowl", gold, "adversarial") == 0
    assert score("locomo", "It is not mentioned anywhere", ["none"]) == 1


def test_lcs_agrees_with_the_table():
    def table(left, right):
        row = [0] * (len(right) + 1)
        for word in left:
            before = row[:]
            for j, other in enumerate(right):
                row[j + 1] = before[j] + 1 if word == other else max(before[j + 1], row[j])
        return row[-1]

    rng = random.Random(0)
    for _ in range(300):
        left, right = (rng.choices("abcd", k=rng.randrange(12)) for _ in range(2))
        assert lcs(left, right) == table(left, right)


def test_without_golds_there_is_no_score_and_an_unknown_metric_is_named():
    for metric, scored in METRICS.items():
        assert scored("x", []) == 0, metric
    with pytest.raises(ValueError, match=r"em, f1.*got 'bleu'"):
        score("bleu", "x", ["x"])
