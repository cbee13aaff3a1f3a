"""Several processes give what one gives: whole runs by torchrun and gloo."""

import pytest
from memory_support import grpo_tree
from ranks import close, train
from support import lm_tree, rows_of, weights_of, write_recipe

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("update", ["plain", "in_backward"])
def test_two_ranks_are_one(tmp_path, update):
    """With APOLLO; and a run stopped on two ranks goes on with one."""
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        part = {"kind": update, "max_grad_norm": 1.0}
        if update == "in_backward":
            part["clip"] = "previous_norm"
        tree = lm_tree(
            folder, optimizer={"kind": "apollo", "lr": 3e-3}, update=part,
            loop={"schedule": "constant"},
        )  # fmt: skip
        write_recipe(folder / "recipe.yaml", tree)
    train(one, 1)
    train(two, 2, "loop.steps=5")
    train(two, 1)
    close(two, one)


def test_two_ranks_play_and_train_what_one_does(tmp_path, warm_model):
    """Memory training: the same episodes, the same update."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        tree = grpo_tree(
            tmp_path / name, warm_model,
            objective={"rewards": {"counterfactual": 0.2}},
            loop={"steps": 3, "schedule": "constant"},
            evaluation={"data": {"kind": "kvstream", "split": "heldout", "size": 6}, "every": 3,
                        "metric": "eval/r1"},
        )  # fmt: skip
        write_recipe(tmp_path / name / "recipe.yaml", tree)
    train(tmp_path / "one", 1)
    train(tmp_path / "two", 2)
    one, two = rows_of(tmp_path / "one" / "run"), rows_of(tmp_path / "two" / "run")
    assert any(row.get("grad_norm") for row in one)
    for row, expected in zip(two, one, strict=True):
        assert row.keys() == expected.keys()
        for key, value in expected.items():
            assert row[key] == pytest.approx(value, rel=1e-4, abs=1e-6), (key, row["step"])
    mine, theirs = (weights_of(tmp_path / n / "run" / "final") for n in ("two", "one"))
    for name, weight in theirs.items():
        assert float((mine[name] - weight).abs().max()) < 2e-4, name


@pytest.mark.parametrize(
    "update, loss", [("plain", "logits"), ("plain", "chunked"), ("in_backward", "logits")]
)
def test_two_ranks_train_the_experts_that_one_does(tmp_path, update, loss):
    """Ranks run different operations at the same time, and each expert learns from its rows. A
    loss without logits still tells DDP which experts have none.
    """
    clipped = {"kind": update, "max_grad_norm": 1.0}
    if update == "in_backward":
        clipped["clip"] = "previous_norm"
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        tree = {
            "name": "bank", "run_dir": str(folder / "run"),
            "model": {"kind": "tiny", "hidden_size": 32, "layers": 1, "heads": 2},
            "adapters": {"kind": "bank", "r": 4}, "data": {"kind": "operations", "size": 8},
            "objective": {"kind": "sft", "max_length": 1024},
            "optimizer": {"kind": "adamw", "lr": 3e-3},
            "update": clipped,
            "loop": {"steps": 4, "batch_size": 4, "micro_batch_size": 1, "schedule": "constant",
                     "loss": loss},
        }  # fmt: skip
        write_recipe(folder / "recipe.yaml", tree)
    train(tmp_path / "one", 1)
    train(tmp_path / "two", 2)
    import torch

    for row, expected in zip(
        rows_of(tmp_path / "two" / "run"), rows_of(tmp_path / "one" / "run"), strict=True
    ):
        for key, value in expected.items():
            assert row[key] == pytest.approx(value, rel=1e-5), (key, row["step"])
    for operation in ("mem_extract", "mem_update", "mem_generate"):
        one, two = (
            weights_of(tmp_path / name / "run" / "final" / operation) for name in ("one", "two")
        )
        assert any(w.abs().sum() > 0 for name, w in one.items() if "lora_B" in name)
        for name, weight in one.items():
            torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-4)
