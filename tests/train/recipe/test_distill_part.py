"""Objective `distill` in a recipe: what it takes over from `sft`, and what it does not go with."""

from pathlib import Path

import pytest
from support import merge, sft_tree

from mnemic.train.errors import RecipeError
from mnemic.train.recipe.describe import arms
from mnemic.train.recipe.distill import DistillObjective, SmolLM2Teacher
from mnemic.train.recipe.load import build_recipe, dump_recipe
from mnemic.train.recipe.training import SftObjective


def tree(folder, **changes):
    found = sft_tree(folder)
    teacher = {"kind": "pretrained", "path": "t"}
    found["objective"] = {"kind": "distill", "max_length": 64, "teacher": teacher}
    return merge(found, changes)


def test_it_has_all_of_sft_and_survives_its_dump(tmp_path):
    recipe = build_recipe(tree(tmp_path, objective={"teacher": "smollm2-135m"}))
    part = recipe.objective
    assert isinstance(part, DistillObjective) and part.teacher == SmolLM2Teacher()
    assert SftObjective.model_fields.keys() < DistillObjective.model_fields.keys()
    assert build_recipe(dump_recipe(recipe)) == recipe
    assert {"sft", "distill"} <= arms(["objective"]).keys()


STREAMED = {"update": "streamed", "offload": {"kind": "host"}}
CASES = [
    ({"objective": {"jsd_beta": 0.2}}, "objective: jsd_beta=0.2 has no effect with divergence="),
    ({"objective": {"divergence": "jsd", "jsd_beta": 1.0}}, "objective.jsd_beta: 1.0 should be"),
    ({"objective": {"hard_weight": 1.0}}, "objective: hard_weight=1 leaves the teacher nothing"),
    ({"objective": {"on_policy": 0.5, "packing": True}}, "set packing=false"),
    ({"objective": {"on_policy": 0.5, "loss_on": "all"}}, "set loss_on=completion, not all"),
    ({"objective": {"on_policy": 1.5}}, "objective.on_policy: 1.5 should be less than or equal"),
    ({"objective": {"temperature": 0}}, "objective.temperature: 0 should be greater than 0"),
    ({"objective": {"divergence": "kl"}}, "objective.divergence: 'kl' is not one of forward_kl"),
    ({"objective": {"teacher": {"kind": "tiny"}}}, "objective.teacher.kind: 'tiny' is not one of"),
    ({"objective": {"teacher": {"pth": "x"}}}, "objective.teacher.pth: unknown key"),
    (STREAMED, "objective.kind=distill compares whole distributions; set update.kind=in_backward"),
    ({**STREAMED, "objective": {"on_policy": 1.0}}, "and samples from the whole model"),
    ({"tokens": "protect"}, "tokens.kind=protect drops tokens that the teacher judges"),
    ({"data": {"kind": "text", "path": "x"}}, "data.kind=text has no prompts"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "sentence"), CASES, ids=[c[1][:30] for c in CASES])
def test_what_contradicts_itself_is_one_sentence(tmp_path: Path, changes, sentence):
    with pytest.raises(RecipeError) as caught:
        build_recipe(tree(tmp_path, **changes))
    assert any(sentence in problem for problem in caught.value.problems), caught.value.problems


def test_a_teacher_is_not_optional(tmp_path):
    found = tree(tmp_path)
    del found["objective"]["teacher"]
    with pytest.raises(RecipeError, match=r"objective\.teacher: missing"):
        build_recipe(found)
