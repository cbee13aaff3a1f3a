"""Rewards, one by one; and that neither doing nothing nor storing everything is the best policy."""

import pytest

from mnemic.models.memory.episode import MemoryConfig, MemoryEpisode
from mnemic.models.memory.rule_reader import RuleReader
from mnemic.train.data.memory.episode import EpisodeRow, Question
from mnemic.train.data.memory.kvstream import KvStream, episode
from mnemic.train.data.memory.teacher import Weaknesses, teach
from mnemic.train.objectives.grpo import group_advantages
from mnemic.train.recipe.memory import GrpoObjective, Rewards
from mnemic.train.rollout.rewards import (
    compression,
    gate_compression,
    outcome,
    overrun,
    stale,
    supported,
    valid,
    worth_storing,
)

CONFIG = MemoryConfig(store="flat", syntax="lines", form="text")
ROW = EpisodeRow(
    "a", "test", ("anna city rome\nthe bus was late", "anna city now oslo", "see you soon"),
    (Question("anna city?", ("oslo",), "updated", (1,), ("rome",)),), "em",
    (
        ({"op": "insert", "key": "anna city", "content": "anna city rome"}, {"op": "noise"}),
        ({"op": "update", "key": "anna city", "content": "anna city oslo"},),
        ({"op": "noise"},),
    ),
)  # fmt: skip


def played(*texts, row=ROW, config=CONFIG):
    made = MemoryEpisode(row.chunks, [q.q for q in row.questions], config)
    for text in texts:
        made.step(text)
    return made


def result(made, row=ROW):
    asked = list(range(len(row.questions)))
    return outcome(made, row, asked, RuleReader().answer(made.asks()))


def test_a_good_manager_earns_everything():
    made = played("+ anna city rome", "= m0 anna city oslo", "noop")
    found = result(made)
    assert found.correct == 1 and found.stale == 0 and found.answers == ["oslo"]
    assert found.valid == [1, 1, 1] and found.supported[:2] == [1, 1]
    assert found.compression == pytest.approx(1 - 3 / made.stream_tokens())


def test_a_superseded_value_is_wrong_and_stale():
    found = result(played("+ anna city rome", "+ anna city oslo", "noop"))
    assert found.answers == ["rome"] and found.correct == 0 and found.stale == -1


def test_silence_never_beats_a_good_write():
    silent = played("noop", "", "noop")
    assert worth_storing(ROW) == [True, True, False]
    marks = [valid(t, w) for t, w in zip(silent.turns, worth_storing(ROW), strict=True)]
    assert marks == [0, 0, 1]
    unknown = [valid(t, None) for t in silent.turns]
    assert unknown == [0.5, 0, 0.5]
    good = played("+ anna city rome", "= m0 anna city oslo", "noop")
    assert all(valid(t, None) >= s for t, s in zip(good.turns, unknown, strict=True))


def test_each_bad_call_lowers_only_its_own_turn():
    made = played("+ anna city rome\nblah\n= m9 x y", "= m0 anna city oslo", "noop")
    found = result(made)
    assert found.valid == [pytest.approx(1 / 3), 1, 1]
    assert found.correct == 1


def test_support_is_asked_of_contents_and_of_what_is_changed_or_deleted():
    made = played("+ anna city paris forever", "- m0", "- m1")
    assert [supported(t) for t in made.turns[:2]] == [0.0, 1.0]  # "anna city" is in chunk 2
    other = played("+ bob pet cat\n+ anna city rome", "- m0", "= m1 anna city rome anna")
    assert [supported(t) for t in other.turns] == [0.5, 0.0, 0.0]


def test_a_fact_in_other_words_is_borne_out_by_gold_and_a_wrong_value_by_nothing():
    """Sentences: two of the three words stand in the chunk, whichever of the two it is."""
    step = {"op": "insert", "key": "fay job", "content": "fay job sailor"}
    asked = (Question("What is Fay's job?", ("sailor",)),)
    row = EpisodeRow("c", "test", ("Fay earns a living as a sailor.",), asked, "em", ((step,),))
    for text, wanted in (
        ("+ fay job sailor", 1.0), ("+ fay job baker", 0.0), ("+ fay job sailor boston", 0.0),
    ):  # fmt: skip
        made = played(text, row=row)
        assert supported(made.turns[0], row.gold[0]) == wanted
        assert result(made, row).supported == [wanted]
        assert supported(made.turns[0]) == 0.0


def test_compression_is_paid_to_the_answers_that_are_no_worse():
    assert gate_compression([1, 0, 0.5], [0.2, 1.0, 0.5]) == [0.2, 0.0, 0.5]
    assert gate_compression([0.5, 0.5], [0.2, 1.0]) == [0.2, 1.0]
    assert compression(5, 20) == 0.75 and compression(30, 20) == 0


def test_overrun_counts_above_the_budget_only():
    assert overrun(10, None) == 0 and overrun(10, 20) == 0 and overrun(30, 20) == -0.5


def test_a_stale_value_that_is_right_again_is_not_stale():
    row = EpisodeRow(
        "b", "test", ("x",), (Question("anna city?", ("rome",), "updated", (), ("rome",)),)
    )
    assert stale(row, [0], ["rome"]) == 0


def policies(index):
    """Rollouts of one generated episode: gold, do nothing, insert every line."""
    import random

    row = episode(KvStream(n_entities=3, n_attributes=3, p_update=0.4), "train", index)
    made = []
    for policy in ("gold", "nothing", "everything"):
        one = MemoryEpisode(row.chunks, [q.q for q in row.questions], CONFIG)
        for steps in row.gold:
            chunk = row.chunks[len(one.turns)]
            if policy == "gold":
                calls = teach(one, list(steps), Weaknesses(), random.Random(0))
                text = one.syntax.write(calls)
            elif policy == "nothing":
                text = "noop"
            else:
                text = "\n".join("+ " + line for line in chunk.splitlines())
            one.step(text)
        made.append(result(one, row))
    return made


@pytest.mark.parametrize("credit", ["trajectory", "pooled_turn", "turn", "mixed"])
@pytest.mark.parametrize("preset", [None, "mem_alpha", "memory_r1"])
def test_the_do_nothing_and_insert_all_traps_are_shut(credit, preset):
    """Under every credit mode and preset the gold policy has the best mean advantage by far."""
    from mnemic.train.recipe.memory import with_preset

    values = {"kind": "grpo", **({"preset": preset} if preset else {})}
    part = GrpoObjective.model_validate({**with_preset(values), "credit": credit})
    totals = [0.0, 0.0, 0.0]
    for index in range(40):
        found = group_advantages(policies(index), part)
        totals = [a + sum(row) / len(row) for a, row in zip(totals, found, strict=True)]
    gold, nothing, everything = (total / 40 for total in totals)
    assert gold > nothing + 0.2 and gold > everything + 0.2, (gold, nothing, everything)


def test_without_the_gate_an_empty_memory_would_be_paid():
    """What the gate is for: with compression at the weight that collapsed Mem-alpha, the same
    advantage as the good manager's is out of reach for silence.
    """
    part = GrpoObjective(rewards=Rewards(compression=0.4), credit="trajectory", scale=False)
    silent = result(played("noop", "noop", "noop"))
    poor = result(played("+ anna city rome", "noop", "noop"))
    good = result(played("+ anna city rome", "= m0 anna city oslo", "noop"))
    found = [row[0] for row in group_advantages([silent, poor, good], part)]
    assert found[0] < found[2] and found[0] <= found[1] + 0.15
