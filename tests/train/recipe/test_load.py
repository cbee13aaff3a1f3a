"""Recipes: overrides, kind switches, and one sentence for each mistake."""

import json

import pytest
from support import lm_tree, write_recipe

from mnemic.train.errors import RecipeError
from mnemic.train.recipe.load import (
    apply_overrides,
    build_recipe,
    dump_recipe,
    load_recipe,
    parse_overrides,
    read_yaml,
    shipped_recipes,
    to_yaml,
)
from mnemic.train.recipe.recipe import Recipe


def problems(tree):
    with pytest.raises(RecipeError) as caught:
        build_recipe(tree)
    return caught.value.problems


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"optimizer": {"lrr": 1}}, "optimizer.lrr: unknown key; did you mean 'lr'?"),
        ({"optimiser": {}}, "optimiser: unknown key; did you mean 'optimizer'?"),
        (
            {"optimizer": {"kind": "adamww"}},
            "optimizer.kind: 'adamww' is not one of adamw, adamw8bit, sgd, adafactor, muon, "
            "galore, apollo, apollo_mini; did you mean 'adamw'?",
        ),
        ({"optimizer": {"lr": "fast"}}, "optimizer.lr: 'fast' should be a valid number"),
        ({"optimizer": {"lr": -1}}, "optimizer.lr: -1 should be greater than 0"),
        ({"optimizer": {"lr": float("nan")}}, "optimizer.lr: nan should be a finite number"),
        ({"loop": {"steps": None}}, "loop: give exactly one of steps and epochs"),
        (
            {"loop": {"schedule": "cosinee"}},
            "loop.schedule.kind: 'cosinee' is not one of constant, linear, cosine, wsd",
        ),
        (
            {"loop": {"batch_size": 8, "micro_batch_size": 3}},
            "loop: batch_size=8 is not a multiple",
        ),
        ({"loop": 3}, "loop: 3 is not a section of keys"),
        ({"name": "a/b"}, "name: 'a/b'"),
        ({"objective": {"kind": "sft"}}, "data.kind=text has no prompts; set objective.kind=lm"),
        (
            {"objective": {"seq_len": 9999}},
            "objective.seq_len=9999 is longer than model.max_position",
        ),
        ({"evaluation": {"every": 5}}, "evaluation: give exactly one of data and holdout"),
        (
            {"evaluation": {"holdout": 0.1, "exact_match": True}},
            "evaluation.exact_match needs prompts",
        ),
        (
            {"evaluation": {"data": {"kind": "csv", "paht": "x"}}},
            "evaluation.data.paht: unknown key; did you mean 'path'?",
        ),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, change, sentence):
    found = problems(lm_tree(tmp_path, **change))
    assert any(line.startswith(sentence) for line in found), found
    assert all("\n" not in line for line in found)


def test_every_mistake_is_reported_at_once(tmp_path):
    found = problems(lm_tree(tmp_path, loop={"sed": 1}, optimizer={"lr": 0, "epss": 1}))
    assert len(found) == 3


def test_missing_sections_are_named():
    assert "objective: missing; it has no default" in problems({"name": "x"})


def test_overrides_last_wins_and_values_are_yaml(tmp_path):
    tree = lm_tree(tmp_path)
    items = ["loop.steps=5", "optimizer.lr=1e-4", "loop.steps=7", "update.max_grad_norm=null"]
    assert apply_overrides(tree, parse_overrides(items)) == []
    recipe = build_recipe(tree)
    assert (recipe.loop.steps, recipe.optimizer.lr) == (7, 1e-4)
    assert recipe.update.max_grad_norm is None


@pytest.mark.parametrize("switch", ["optimizer.kind=sgd", "optimizer=sgd"])
def test_a_kind_switch_says_which_keys_no_longer_apply(tmp_path, switch):
    tree = lm_tree(tmp_path, optimizer={"beta2": 0.95, "eps": 1e-6})
    notes = apply_overrides(tree, parse_overrides(["optimizer.momentum=0.9", switch]))
    assert len(notes) == 1
    assert "optimizer.beta2, optimizer.eps" in notes[0] and "no longer apply" in notes[0]
    optimizer = build_recipe(tree).optimizer
    assert (optimizer.kind, optimizer.lr, optimizer.momentum) == ("sgd", 3e-3, 0.9)


def test_override_below_a_shorthand_keeps_its_kind(tmp_path):
    tree = lm_tree(tmp_path, loop={"schedule": "linear"}, model="tiny")
    apply_overrides(tree, parse_overrides(["loop.schedule.warmup=3", "model.layers=3"]))
    recipe = build_recipe(tree)
    assert (recipe.loop.schedule.kind, recipe.loop.schedule.warmup) == ("linear", 3)
    assert recipe.model.layers == 3


@pytest.mark.parametrize("item", ["loop.steps", "=3", "loop..steps=3", "loop.steps=[1"])
def test_malformed_overrides(item):
    with pytest.raises(RecipeError):
        parse_overrides([item])


def test_an_override_below_a_plain_value_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="name: holds the value 'tiny'"):
        apply_overrides(lm_tree(tmp_path), parse_overrides(["name.x=1"]))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "line 1"),
        ("- 1\n- 2\n", "a list, not a mapping"),
        ("", "empty"),
        ("name: a\nname: b\n", "key 'name' stands twice"),
        ("? [a]\n: 1\n", "key must be a plain word"),
        ("a: !!python/object/apply:os.system ['true']\n", "not valid YAML"),
    ],
)
def test_broken_yaml(tmp_path, text, words):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=words):
        read_yaml(path)


def test_the_dump_is_complete_and_loads_to_the_same_recipe(tmp_path):
    recipe = build_recipe(lm_tree(tmp_path, evaluation={"holdout": 0.1}))
    path = tmp_path / "dump.yaml"
    path.write_text(to_yaml(dump_recipe(recipe)))
    assert build_recipe(read_yaml(path)) == recipe
    assert dump_recipe(recipe)["optimizer"]["beta1"] == 0.9


def test_recipes_are_frozen(tmp_path):
    recipe = build_recipe(lm_tree(tmp_path))
    with pytest.raises(ValueError, match="frozen"):
        recipe.loop.steps = 3


def test_every_shipped_recipe_loads():
    shipped = shipped_recipes()
    assert {"quickstart", "pretrain_tiny"} <= shipped.keys()
    for name in shipped:
        recipe, notes = load_recipe(name, [])
        assert recipe.name == name and notes == []


def test_schema_describes_every_field():
    schema = Recipe.model_json_schema()
    json.dumps(schema)
    bare = [
        f"{name}.{key}"
        for name, part in schema["$defs"].items()
        for key, field in part["properties"].items()
        if key != "kind" and "description" not in field
    ]
    assert bare == []


def test_a_recipe_file_is_found_by_path_and_by_name(tmp_path):
    path = write_recipe(tmp_path / "mine.yaml", lm_tree(tmp_path))
    assert load_recipe(str(path), [])[0].name == "tiny"
    with pytest.raises(RecipeError, match="no such file, and no shipped recipe"):
        load_recipe("nothing", [])
