"""Low-memory mode: what is chosen, in which order, and that a run is what was chosen."""

import json
import logging

import pytest
from support import lm_tree, merge, rows_of, sft_tree, train_here, write_recipe

from mnemic.train import doctor
from mnemic.train.cli import main
from mnemic.train.errors import RecipeError, UserError
from mnemic.train.plan import budget as budgets
from mnemic.train.plan import choose as choosing
from mnemic.train.plan import counter as counting
from mnemic.train.plan.choose import choose
from mnemic.train.plan.counter import Counter
from mnemic.train.plan.levers import as_arguments, changed, grade, inexact, ways
from mnemic.train.recipe.load import build_recipe, load_recipe, read_yaml
from mnemic.train.recipe.recipe import Recipe

LARGE = {
    "model": {"hidden_size": 256, "layers": 2, "heads": 4},
    "objective": {"seq_len": 64},
    "update": {"kind": "plain", "max_grad_norm": 0.5},
    "loop": {"batch_size": 4, "steps": 4, "save_every": 2, "memory_budget": "1GiB"},
}


@pytest.fixture(autouse=True)
def still_machine(monkeypatch):
    """A process that weighs nothing, so that budgets are about the run; speeds that do not vary."""
    monkeypatch.setattr(doctor, "TEST_BYTES", 4 << 20)
    monkeypatch.setattr(counting, "imports_bytes", lambda *_: 0)
    monkeypatch.setattr(counting, "measure_flops", lambda *_: 1e11)
    disk = {"read_bytes_per_second": 1e9, "write_bytes_per_second": 5e8, "free_bytes": 1 << 40}
    monkeypatch.setattr(counting, "disk_speeds", lambda *_: disk)


@pytest.mark.slow
def test_each_stage_comes_in_its_turn(tmp_path):
    """Ever smaller budgets, until the method itself has to change."""
    counter, found = Counter(build_recipe(lm_tree(tmp_path, **LARGE))), []
    counter.budget = 1 << 40
    while not found or not found[-1].grade.methods:
        found.append(choosing._Search(counter).run(more=False).chosen)
        assert found[-1].need <= counter.budget and not found[-1].reason
        counter.budget = int(found[-1].need * 0.8)
    assert not found[0].candidate.overrides, "the recipe fits as it is"
    needs = [option.need for option in found]
    assert needs == sorted(needs, reverse=True)
    orders = [option.grade.order for option in found]
    assert orders == sorted(orders), "an exact choice always goes before an inexact one"
    words = list(dict.fromkeys(option.grade.word for option in found))
    assert words == ["exact", "rounds", "another method"]
    exact = [option for option in found if option.grade.word == "exact"]
    kinds = [option.recipe.update.kind for option in exact]
    assert kinds[0] == "plain" and kinds[-1] == "streamed"
    stages = {key for option in found for key in option.candidate.overrides}
    assert {"offload.activations", "offload.kind", "model.dtype", "optimizer.kind"} <= stages
    # The same budget in another order of asking.
    counter.budget = exact[-1].need
    assert choosing._Search(counter).run(more=False).chosen.need == exact[-1].need


def test_among_equals_the_quickest_is_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr(choosing, "_MORE", 1.0)
    tree = lm_tree(tmp_path, **LARGE)
    own = choose(build_recipe(tree), more=False).chosen
    tree["loop"]["memory_budget"] = str(own.need * 3 // 4)
    choice = choose(build_recipe(tree))
    seconds = [o.seconds for o in (choice.chosen, *choice.options)]
    assert seconds == sorted(seconds) and choice.chosen.seconds >= own.seconds
    assert choice.given.reason == "over the budget"
    assert choice.chosen.recipe.loop.memory_budget == tree["loop"]["memory_budget"]


def test_overrides_can_be_pasted(tmp_path):
    recipe = build_recipe(lm_tree(tmp_path, **LARGE))
    path = str(write_recipe(tmp_path / "recipe.yaml", lm_tree(tmp_path, **LARGE)))
    for extra in (one for level in inexact(recipe) for one in level):
        for way in ways(recipe):
            try:
                expected = changed(recipe, {**way, **extra})
            except RecipeError:
                continue
            again, _ = load_recipe(path, as_arguments({**way, **extra}).split())
            assert again.update == expected.update and again.offload == expected.offload
            assert again.optimizer == expected.optimizer


def test_what_is_exact(tmp_path):
    def word(changes, overrides):
        given = build_recipe(lm_tree(tmp_path, **changes))
        return grade(given, changed(given, overrides)).word

    clipped, free = {"update": {"max_grad_norm": 1.0}}, {"update": {"max_grad_norm": None}}
    streamed = {"update.kind": "streamed", "offload.kind": "ssd"}
    exact = streamed | {"update.clip": "exact_spill", "update.max_grad_norm": 1.0}
    assert word(free, {"update.kind": "in_backward"}) == "exact"
    assert word(clipped, exact) == word(free, streamed) == "exact"
    inside = {"update.kind": "in_backward", "update.clip": "previous_norm"}
    assert word(clipped, inside) == "another method"
    bf16 = free | {"model": {"dtype": "bf16"}}
    assert word(bf16, streamed) == "rounds", "AdamW gets the master weights that it did not have"
    assert word(bf16, {"loop.micro_batch_size": 4}) == "rounds"
    assert word(free, {"loop.micro_batch_size": 4}) == "exact"
    assert word(free, {"optimizer.kind": "apollo_mini"}) == "another method"
    lora = {"adapters": {"kind": "lora"}}
    assert word(lora | bf16, {"loop.micro_batch_size": 4}) == "exact"
    dropped = {"adapters": {"kind": "lora", "dropout": 0.1}}
    assert word(dropped, {"loop.micro_batch_size": 4}) == "rounds"
    assert word(lora, exact | {"offload.base": "nf4"}) == "rounds"
    levels = inexact(build_recipe(lm_tree(tmp_path, **lora)))
    assert levels[0] == [{}] and {"offload.base": "nf4", "model.dtype": "bf16"} in levels[2]
    assert not any("optimizer.kind" in one for level in levels for one in level)


def test_tokens_are_left_out_only_where_some_are_not_supervised(tmp_path):
    def shares(tree):
        levels = inexact(build_recipe(tree))
        return {one["tokens.keep"] for level in levels for one in level if "tokens.keep" in one}

    assert shares(sft_tree(tmp_path)) == {0.5, 0.25}
    assert not shares(lm_tree(tmp_path)), "every token of a text has a loss"
    assert not shares(sft_tree(tmp_path, objective={"loss_on": "all"}))
    assert not shares(sft_tree(tmp_path, tokens="protect")), "the user's own share stays"
    given = build_recipe(sft_tree(tmp_path))
    new = changed(given, {"tokens.kind": "protect", "tokens.keep": 0.25})
    assert grade(given, new).methods == (
        "gradients through 25% of the tokens, supervised ones among them",
    )


def test_kernels_are_counted_where_rows_of_many_lengths_are_multiplied_in_bf16(tmp_path):
    def kernels(tree):
        counter = Counter(build_recipe(tree))
        return counter.need(counter.given)[1].host.get("kernels")

    small = {"update": "in_backward", "loop": {"precision": "bf16"}}
    assert kernels(sft_tree(tmp_path, **small)) == 24 << 20
    assert kernels(sft_tree(tmp_path, **small, offload="ssd") | {"update": "streamed"}) == 24 << 20
    assert kernels(lm_tree(tmp_path, **small)) == 0
    assert kernels(sft_tree(tmp_path, update="in_backward")) == 0


# Runs --------------------------------------------------------------------------------------------


@pytest.fixture
def here(monkeypatch):
    """The choice is made in this process, whose imports weigh nothing; how often."""
    calls = []

    def count(tree):
        calls.append(tree)
        return budgets.chosen(tree, ".")

    monkeypatch.setattr(budgets, "apart", count)
    return calls


@pytest.mark.slow
def test_a_run_is_what_was_chosen_and_resume_keeps_it(tmp_path, here, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "mnemic")
    tree = lm_tree(tmp_path, **merge(dict(LARGE), {"loop": {"schedule": "constant"}}))
    # Less than a model in memory takes with one row at once.
    tree["loop"]["memory_budget"] = size = "26.5MiB"

    def run(name, **loop):
        changes = {"run_dir": str(tmp_path / name), "loop": loop}
        return train_here(merge(json.loads(json.dumps(tree)), changes))

    run("plain", memory_budget=None)
    run("some", memory_budget="33MiB")
    assert here and read_yaml(tmp_path / "some" / "recipe.yaml")["update"]["kind"] == "plain"
    assert "offload.activations=ssd" in caplog.text
    run("whole", steps=2)
    stored = read_yaml(tmp_path / "whole" / "recipe.yaml")
    assert stored["update"] == {
        "kind": "streamed", "clip": "exact_spill", "max_grad_norm": 0.5
    }  # fmt: skip
    assert stored["loop"]["memory_budget"] == size and len(here) == 2
    assert "; exact" in caplog.text
    monkeypatch.setattr(budgets, "apart", lambda _: pytest.fail("chose anew"))
    run("whole")
    assert "as this run began" in caplog.text
    kept = read_yaml(tmp_path / "whole" / "recipe.yaml")
    assert kept["update"] == stored["update"] and kept["loop"]["steps"] == 4
    plain = rows_of(tmp_path / "plain")
    assert len(plain) == 4
    for name in ("some", "whole"):
        for row, other in zip(plain, rows_of(tmp_path / name), strict=True):
            assert other["step"] == row["step"]
            assert other["loss"] == pytest.approx(row["loss"], rel=1e-5)
    run("whole", steps=5, memory_budget="3GiB")
    with pytest.raises(UserError, match=r"another recipe \(.*loop.batch_size"):
        run("whole", batch_size=2)


def test_a_run_begun_without_it_goes_on_as_it_was(tmp_path, here):
    tree = lm_tree(tmp_path, loop={"steps": 2})
    train_here(tree)
    train_here(merge(tree, {"loop": {"steps": 3, "memory_budget": "auto"}}))
    assert not here and read_yaml(tmp_path / "run" / "recipe.yaml")["update"]["kind"] == "plain"


def test_the_command_line(tmp_path, caplog):
    """The choice is made in a process of its own: what that takes is real."""
    caplog.set_level(logging.INFO, "mnemic")
    recipe = str(write_recipe(tmp_path / "recipe.yaml", lm_tree(tmp_path, loop={"steps": 2})))
    assert main(["train", recipe, "--low-memory", "loop.steps=3"]) == 0
    assert "chosen for" in caplog.text and "the recipe as it is" in caplog.text
    stored = read_yaml(tmp_path / "run" / "recipe.yaml")
    assert stored["loop"]["memory_budget"] == "auto" and stored["loop"]["steps"] == 3


def test_the_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(choosing, "_MORE", 0.0)
    recipe = str(write_recipe(tmp_path / "recipe.yaml", lm_tree(tmp_path, **LARGE)))
    assert main(["plan", recipe, "--low-memory", "33MiB"]) == 0
    out = capsys.readouterr().out
    assert "chosen" in out and "as it is" in out and "x  exact" in out
    assert main(["plan", recipe, "--low-memory", "33MiB", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["chosen"]["need_bytes"] <= 33 << 20 < values["recipe"]["need_bytes"]
    assert values["chosen"]["arguments"] in out


def test_mistakes_are_one_sentence(tmp_path, capsys, monkeypatch):
    recipe = str(write_recipe(tmp_path / "recipe.yaml", lm_tree(tmp_path, **LARGE)))
    assert main(["train", recipe, "--low-memory", "lots"]) == 2
    assert "--low-memory: 'lots' is not a size" in capsys.readouterr().err
    assert main(["plan", recipe, "loop.memory_budget=0"]) == 2
    assert "loop.memory_budget: 0 is no memory" in capsys.readouterr().err
    assert main(["plan", recipe, "--low-memory", "1GiB", "--length", "64"]) == 2
    assert "--length: does not go with --low-memory" in capsys.readouterr().err
    assert main(["plan", recipe, "--low-memory", "16KiB"]) == 1
    assert "the least is" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["plan", recipe, "--low-memory"]) == 1
    assert "is for one process" in capsys.readouterr().err


def test_the_key_is_documented():
    loop = Recipe.model_json_schema()["$defs"]["Loop"]["properties"]
    assert "8GiB" in loop["memory_budget"]["description"]
