"""Advantages: the closed forms, ragged groups, groups without any difference."""

import math

import pytest

from mnemic.train.rollout.credit import advantages

MODES = ["trajectory", "pooled_turn", "turn", "mixed"]
EPISODE = [1.0, 0.5, 0.0]
TURNS = [[0.2, 0.0], [0.0, 0.0], [0.1, 0.3]]


def normal(values):
    mean = sum(values) / len(values)
    deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return [(v - mean) / (deviation + 1e-6) for v in values]


def test_trajectory_copies_one_advantage_to_all_turns():
    found = advantages("trajectory", EPISODE, TURNS, scale=True)
    wanted = normal([1.1, 0.5, 0.2])
    assert found == [[pytest.approx(w)] * 2 for w in wanted]


def test_pooled_turn_is_normalised_over_all_turns_of_the_group():
    found = advantages("pooled_turn", EPISODE, TURNS, scale=True)
    flat = [v for row in found for v in row]
    assert flat == pytest.approx(normal([1.2, 1.0, 0.5, 0.5, 0.1, 0.3]))


def test_turn_is_normalised_among_the_same_turn_of_the_others():
    found = advantages("turn", EPISODE, TURNS, scale=True)
    for t, column in enumerate([[1.2, 0.5, 0.1], [1.0, 0.5, 0.3]]):
        assert [row[t] for row in found] == pytest.approx(normal(column))


def test_mixed_is_the_answers_by_trajectory_and_the_turns_by_turn():
    found = advantages("mixed", EPISODE, TURNS, scale=True)
    whole = normal(EPISODE)
    for t, column in enumerate([[0.2, 0.0, 0.1], [0.0, 0.0, 0.3]]):
        wanted = [a + b for a, b in zip(whole, normal(column), strict=True)]
        assert [row[t] for row in found] == pytest.approx(wanted)


@pytest.mark.parametrize("credit", MODES)
@pytest.mark.parametrize("scale", [True, False])
def test_advantages_of_a_group_sum_to_nothing_and_keep_ragged_shapes(credit, scale):
    turns = [[0.3], [0.0, 0.1, 0.2], [0.5, 0.0]]
    found = advantages(credit, [0.2, 0.9, 0.4], turns, scale=scale)
    assert [len(row) for row in found] == [1, 3, 2]
    if credit == "trajectory":
        assert sum(row[0] for row in found) == pytest.approx(0, abs=1e-6)
    elif credit == "pooled_turn":
        assert sum(sum(row) for row in found) == pytest.approx(0, abs=1e-6)
    elif credit == "turn":
        for t in range(3):
            assert sum(row[t] for row in found if len(row) > t) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("credit", MODES)
def test_no_difference_is_no_advantage_whatever_the_scale(credit):
    """And none of the blow-up of a deviation near zero."""
    found = advantages(credit, [0.7] * 4, [[0.1, 0.2]] * 4, scale=True)
    if credit == "pooled_turn":  # its turns differ among themselves
        assert [row[0] for row in found] == [found[0][0]] * 4
    else:
        assert found == [[0.0, 0.0]] * 4
    assert advantages(credit, [1 / 3] * 3, [[], [], []], scale=True) == [[], [], []]
    rounding = advantages(credit, [0.1 + 0.2, 0.3], [[0.0], [0.0]], scale=True)
    assert rounding == [[0.0], [0.0]]


def test_trajectory_and_mixed_do_not_depend_on_the_number_of_chunks():
    """Twice as many turns of the same rewards: the same advantages, so long streams weigh no more
    in a group's mean. The pooled mode, by its definition, does depend on it.
    """
    short = [[0.2, 0.2], [0.0, 0.0]]
    uneven = [[0.2] * 8, [0.0, 0.0]]
    for credit in ("trajectory", "mixed"):
        a = advantages(credit, [1.0, 0.0], short, scale=True)
        b = advantages(credit, [1.0, 0.0], uneven, scale=True)
        assert [row[0] for row in a] == pytest.approx([row[0] for row in b])
    a = advantages("pooled_turn", [1.0, 0.0], short, scale=True)
    b = advantages("pooled_turn", [1.0, 0.0], uneven, scale=True)
    assert a[1][0] < -0.8 and b[1][0] < a[1][0] - 0.5


def test_without_scale_advantages_are_differences():
    found = advantages("trajectory", [1.0, 0.0], [[0.0], [0.0]], scale=False)
    assert found == [[0.5], [-0.5]]
