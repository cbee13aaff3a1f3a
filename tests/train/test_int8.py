"""Runs with `model.weights=int8`: resume to the same bits, export, and what is refused."""

import pytest
import torch
from support import lm_tree, merge, rows_of, same_weights, train_here, weights_of

from mnemic.models.int8 import dense_state
from mnemic.optim.int8 import Int8Weight
from mnemic.train.errors import RecipeError, UserError
from mnemic.train.recipe.load import build_recipe


def tree(tmp_path, **changes):
    model = {"weights": "int8", "dtype": "bf16"}
    return merge(lm_tree(tmp_path, model=model, optimizer={"kind": "apollo"}), changes)


@pytest.mark.parametrize("update", ["plain", "in_backward"])
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, update, monkeypatch):
    from mnemic.train.trainer import Trainer

    changes = {"update": {"kind": update}} if update != "plain" else {}
    whole = tree(tmp_path, run_dir=str(tmp_path / "whole"), **changes)
    train_here(whole)
    broken = tree(tmp_path, run_dir=str(tmp_path / "broken"), **changes)
    save = Trainer.save

    def stop_after(self):
        path = save(self)
        if self.step == 3:
            self.stop("signal test")
        return path

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", stop_after)
        assert train_here(broken)["steps"] == 3
    assert train_here(broken)["steps"] == 8
    assert rows_of(tmp_path / "broken") == rows_of(tmp_path / "whole")
    for part in ("checkpoints/step-00000008", "final"):
        found = weights_of(tmp_path / "broken" / part)
        assert same_weights(found, weights_of(tmp_path / "whole" / part))
    saved = weights_of(tmp_path / "whole" / "checkpoints/step-00000008")
    early = weights_of(tmp_path / "whole" / "checkpoints/step-00000006")
    codes = [name for name in saved if name.endswith(".codes")]
    assert len(codes) == 7 and all(saved[name].dtype == torch.int8 for name in codes)
    assert any(not torch.equal(saved[name], early[name]) for name in codes), "trained"


def test_an_export_is_the_dense_model_and_the_run_stays_int8(tmp_path):
    from transformers import AutoModelForCausalLM

    from mnemic.train.export import export_run, load_run

    train_here(tree(tmp_path, loop={"gradient_checkpointing": True}))
    held, _, _ = load_run(str(tmp_path / "run"))
    out = export_run(str(tmp_path / "run"), str(tmp_path / "out"), checkpoint=None, merge=False)
    dense = AutoModelForCausalLM.from_pretrained(out, dtype="auto").eval()
    assert {type(p) for p in dense.parameters()} == {torch.nn.Parameter}
    assert {p.dtype for p in dense.parameters()} == {torch.bfloat16}
    assert sum(isinstance(p, Int8Weight) for p in held.parameters()) == 7
    state = dense_state(held)
    assert all(torch.equal(param, state[name]) for name, param in dense.named_parameters())
    assert same_weights(weights_of(out), weights_of(tmp_path / "run" / "final"))


def test_a_checkpoint_of_full_weights_is_not_taken_for_int8(tmp_path):
    full = lm_tree(tmp_path, run_dir=str(tmp_path / "full"), optimizer={"kind": "apollo"})
    train_here(full)
    checkpoint = tmp_path / "full" / "checkpoints" / "step-00000008"
    with pytest.raises(UserError, match=r"holds other weights than this model trains"):
        train_here(tree(tmp_path, loop={"resume": str(checkpoint)}))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"adapters": {"kind": "lora"}}, "adapters.kind=lora freezes the weights that"),
        ({"optimizer": {"kind": "adamw"}}, "optimizer.kind=adamw cannot change int8 weights; set"),
        ({"optimizer": {"kind": "sgd"}}, "optimizer.kind=sgd cannot change int8 weights; set"),
        ({"model": {"weights": "int4"}}, "model.weights: 'int4'"),
    ],
)
def test_contradictions_are_one_sentence(tmp_path, changes, sentence):
    with pytest.raises(RecipeError) as caught:
        build_recipe(tree(tmp_path, **changes))
    assert any(line.startswith(sentence) for line in caught.value.problems), caught.value.problems
