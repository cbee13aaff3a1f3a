"""Recipes of memory training: what contradicts itself is one sentence; presets fill what is not
given.
"""

from pathlib import Path

import pytest
from memory_support import grpo_tree, sft_memory_tree
from support import merge

from mnemic.train.errors import RecipeError
from mnemic.train.recipe.load import build_recipe

HERE = Path("/nowhere")


def grpo(**changes):
    return build_recipe(grpo_tree(HERE, HERE / "model", **changes))


CASES = [
    ({"loop": {"batch_size": 9}}, "loop.batch_size=9 counts rollouts and must be a multiple of"),
    ({"loop": {"steps": None, "epochs": 1}}, "loop.epochs: rollouts have no end"),
    ({"memory": None}, "memory: missing; data needs to know what memory there is"),
    ({"data": {"kind": "text", "path": "x"}}, "data.kind=text has no episodes"),
    ({"data": {"teacher": {"drop": 0.5}}}, "data.teacher has no effect on objective.kind=grpo"),
    ({"update": "streamed", "offload": "ssd"}, "update.kind=streamed has no whole model"),
    ({"tokens": "protect"}, "tokens.kind=protect changes the probabilities"),
    ({"objective": {"answerer": "self"}}, "objective.answerer.kind=self is the model without its"),
    ({"objective": {"max_length": 24}}, "memory.max_new_tokens=24 leaves no room for a prompt"),
    ({"objective": {"rewards": {"overrun": 1.0}}}, "overrun=1 needs budget"),
    ({"objective": {"rewards": {"correct": 0}}}, "correct and counterfactual are both 0"),
    ({"evaluation": {"holdout": 0.5, "metric": "eval/r1"}}, "evaluation.holdout splits rows"),
    ({"evaluation": {"data": {"kind": "kvstream"}}}, "evaluation.metric=eval/loss: grpo has none"),
    ({"data": {"stream": {"p_update": 0.9, "p_delete": 0.2}}}, "p_update + p_delete + p_repeat"),
    ({"data": {"stream": {"mix": {"current": 0}}}}, "mix: all weights are 0"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "sentence"), CASES, ids=[c[1][:24] for c in CASES])
def test_contradictions_are_refused(changes, sentence):
    with pytest.raises(RecipeError) as caught:
        grpo(**changes)
    assert any(sentence in problem for problem in caught.value.problems), caught.value.problems


def test_parts_without_an_effect_are_refused_elsewhere_too():
    tree = sft_memory_tree(HERE)
    for changes, sentence in (
        ({"data": {"stages": [{}]}}, "data.stages has no effect on objective.kind=sft"),
        ({"data": {"kind": "facts"}}, "memory has no effect here"),
        ({"data": {"kind": "episodes", "path": "x"}}, "data.kind=episodes has no operations"),
        ({"objective": {"kind": "lm"}}, "data.kind=kvstream needs objective.kind=sft or grpo"),
        (
            {"evaluation": {"holdout": 0.5, "metric": "eval/r1"}},
            "evaluation.metric=eval/r1 needs evaluation.play",
        ),
    ):
        with pytest.raises(RecipeError) as caught:
            build_recipe(merge(dict(tree), changes))
        assert any(sentence in p for p in caught.value.problems), caught.value.problems


def test_a_preset_fills_what_is_not_given_and_nothing_else():
    plain = grpo(objective={"preset": "mem_alpha"}).objective
    assert (plain.credit, plain.beta, plain.num_generations) == ("pooled_turn", 0.001, 4)
    assert plain.rewards.valid == 1.0 and plain.rewards.compression == 0.05
    own = grpo(objective={"preset": "memagent", "beta": 0.5, "rewards": {"valid": 0.3}}).objective
    assert own.beta == 0.5 and own.rewards.valid == 0.3 and own.rewards.supported == 0.0
    assert not own.scale
    with pytest.raises(RecipeError, match=r"preset.*mem_alfa"):
        grpo(objective={"preset": "mem_alfa"})


def test_rollouts_need_not_divide_into_micro_batches():
    assert grpo(loop={"batch_size": 8, "micro_batch_size": 5}).loop.micro_batch_size == 5
    with pytest.raises(RecipeError, match="not a multiple of micro_batch_size"):
        build_recipe(sft_memory_tree(HERE, loop={"batch_size": 8, "micro_batch_size": 5}))
