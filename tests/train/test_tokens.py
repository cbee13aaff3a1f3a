"""Token sparsity in whole runs: resumed bits, reports, the dense probe, and sentences."""

import copy
import logging

import pytest
import torch
from support import lm_tree, rows_of, same_weights, sft_tree, train_here, weights_of

from mnemic.models.tiny import byte_tokenizer, tiny_llama
from mnemic.train.errors import RecipeError, UserError
from mnemic.train.recipe.load import build_recipe
from mnemic.train.run import run as run_recipe

MODEL = {"layers": 4, "max_position": 64}
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
KINDS = {
    "protect": {"kind": "protect", "block": 4, "keep": 0.3},
    "gone": {"kind": "drop", "block": 4, "keep": 0.3, "ramp": 0.5},
    "visible": {"kind": "drop", "block": 4, "keep": 0.3, "attend": "all"},
    "lemo": {"kind": "lemo", "block": 4},
    "token_tune": {"kind": "token_tune", "keep": 0.3},
    "random_ltd": {"kind": "random_ltd", "keep": 0.3, "ramp": 0.8, "dense_end": 0.2},
}


def tree_of(folder, kind, **changes):
    base = {
        "model": MODEL, "tokens": KINDS[kind],
        "adapters": {"kind": "lora", "r": 4, "dropout": 0.1, "target_modules": QKVO},
    }  # fmt: skip
    tree = sft_tree(folder, **copy.deepcopy(base))
    for key, value in changes.items():
        tree[key] = {**tree.get(key, {}), **value} if isinstance(value, dict) else value
    return tree


def run(folder, kind, **changes):
    folder.mkdir(exist_ok=True)
    train_here(tree_of(folder, kind, **changes))
    return rows_of(folder / "run"), weights_of(folder / "run" / "final")


def some(kinds):
    """Those of `KINDS` in every run of the tests; the others are slow evidence."""
    return [k if k in kinds else pytest.param(k, marks=pytest.mark.slow) for k in KINDS]


@pytest.mark.parametrize("kind", some({"protect", "gone", "random_ltd"}))
def test_a_resumed_run_has_the_same_bits(tmp_path, kind):
    """Tokens are drawn anew from the step's seed, the schedule goes by the step."""
    loop = {"schedule": "constant", "steps": 6}
    rows, weights = run(tmp_path / "straight", kind, loop=loop)
    stopped = {**loop, "save_every": 3}
    folder = tmp_path / "stopped"
    folder.mkdir()
    recipe = build_recipe(tree_of(folder, kind, loop=stopped))
    stop_after(recipe, 3)
    again, same = run(folder, kind, loop=stopped)
    assert again == rows and same_weights(weights, same)
    kept = [row["tokens/kept"] for row in rows if "tokens/kept" in row]
    assert all(0 < share < 1 for share in kept[:4])


def stop_after(recipe, step):
    """Run, and end after `step` with the schedule of the whole run."""
    from unittest import mock

    from rich.console import Console

    from mnemic.train.callbacks.metrics import MetricsFile

    own = MetricsFile.on_step

    def on_step(self, trainer, row):
        if row["step"] == step:
            trainer.stop("test")
        own(self, trainer, row)

    with mock.patch.object(MetricsFile, "on_step", on_step):
        run_recipe(recipe, Console(quiet=True))


@pytest.mark.parametrize("kind", some({"protect", "gone"}))
def test_in_backward_checkpointing_and_micro_batches_change_nothing(tmp_path, kind):
    """No dropout, which draws in another order when layers are recomputed."""
    lora = {"dropout": 0.0}
    plain = {"kind": "plain", "max_grad_norm": None}
    rows, weights = run(tmp_path / "plain", kind, adapters=lora, update=plain)
    again, same = run(tmp_path / "in", kind, adapters=lora, update={"kind": "in_backward"})
    assert again == rows and same_weights(weights, same)
    others, found = run(
        tmp_path / "checkpointing", kind, adapters=lora, update=plain,
        loop={"gradient_checkpointing": True},
    )  # fmt: skip
    assert [r["loss"] for r in others] == pytest.approx([r["loss"] for r in rows], rel=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


def test_reports_and_the_dense_probe(tmp_path):
    rows, _ = run(tmp_path / "a", "gone", tokens={**KINDS["gone"], "ramp": 0.0, "probe_every": 2})
    assert rows[0]["tokens/supervised_dropped"] == 0
    layers = [key for key in rows[0] if key.startswith("tokens/kept_layer_")]
    assert layers == [f"tokens/kept_layer_{i}" for i in (1, 2, 3)]
    assert rows[0]["tokens/kept"] == pytest.approx(
        (1 + sum(rows[0][key] for key in layers)) / 4, rel=1e-6
    )
    probed = [row for row in rows if "tokens/probe_cosine" in row]
    assert [row["step"] for row in probed] == [2, 4, 6, 8]
    assert all(0 < row["tokens/probe_cosine"] < 0.99999 for row in probed)
    # A probe changes nothing; and where nothing is dropped it finds no difference.
    unprobed, _ = run(tmp_path / "b", "gone", tokens={**KINDS["gone"], "ramp": 0.0})
    strip = lambda r: {k: v for k, v in r.items() if "probe" not in k}  # noqa: E731
    assert [strip(r) for r in rows] == unprobed
    lora = {"dropout": 0.0}
    dense, _ = run(
        tmp_path / "c", "gone", adapters=lora,
        tokens={**KINDS["gone"], "ramp": 0.0, "keep": 1.0, "probe_every": 4},
    )  # fmt: skip
    probe = next(row for row in dense if "tokens/probe_cosine" in row)
    assert probe["tokens/probe_cosine"] == pytest.approx(1.0, abs=1e-6)
    assert probe["tokens/probe_loss"] == probe["tokens/probe_dense_loss"]


def test_sparse_rows_in_sequence_chunks(tmp_path):
    lora = {"dropout": 0.0}
    tokens = {**KINDS["gone"], "keep": 0.6}
    rows, _ = run(tmp_path / "whole", "gone", adapters=lora, tokens=tokens)
    others, _ = run(
        tmp_path / "chunks", "gone", adapters=lora, tokens=tokens, loop={"sequence_chunk": 16}
    )
    assert [r["loss"] for r in others] == pytest.approx([r["loss"] for r in rows], rel=1e-5)


def last_first(look):
    """A user's score: the later the better."""
    length = look.hidden.shape[1]
    return torch.arange(length).float().expand(len(look.hidden), length)


def test_a_users_own_score_and_a_small_models(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "my_scores", sys.modules[__name__])
    mine, _ = run(
        tmp_path / "mine", "gone", tokens={**KINDS["gone"], "score": "my_scores:last_first"}
    )
    window, _ = run(tmp_path / "window", "gone", tokens={**KINDS["gone"], "score": "window"})
    assert mine == window
    small = tmp_path / "small"
    tokenizer = byte_tokenizer(64)
    tiny_llama(
        tokenizer, hidden_size=16, layers=1, heads=2, max_position=64, seed=3
    ).save_pretrained(small)
    rows, _ = run(
        tmp_path / "model", "gone",
        tokens={**KINDS["gone"], "score": "model", "score_path": str(small)},
    )  # fmt: skip
    assert rows[0]["tokens/kept"] < 1 and rows[-1]["loss"] < rows[0]["loss"]


SENTENCES = {
    "everything protected": ({"tokens": "protect"}, "every token, so nothing would be dropped"),
    "streamed": (
        {"tokens": {"kind": "protect", "protect": False}, "update": "streamed", "offload": "ssd"},
        "set tokens.loss=all, or update.kind=in_backward",
    ),
    "no such score": ({"tokens": {"kind": "protect", "score": "best"}}, "is not one of attention"),
    "a model without a path": ({"tokens": {"kind": "protect", "score": "model"}}, "score_path"),
    "lemo on trained MLPs": ({"tokens": "lemo"}, "adapters.target_modules"),
    "chunks and visible tokens": (
        {"tokens": {"kind": "drop", "attend": "all"}, "loop": {"sequence_chunk": 16}},
        "tokens.attend=all does not",
    ),
    "more than the run": (
        {"tokens": {"kind": "random_ltd", "ramp": 0.9, "dense_end": 0.5}}, "more than the whole run"
    ),
    "half a scope": (
        {"tokens": {"kind": "token_tune", "scope": "attention"}}, "scope=attention hides"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SENTENCES)
def test_sentences(tmp_path, case):
    changes, words = SENTENCES[case]
    with pytest.raises(RecipeError) as caught:
        build_recipe(lm_tree(tmp_path, **changes))
    assert any(words in problem for problem in caught.value.problems), caught.value.problems


def test_what_is_not_there_is_said_before_anything_loads(tmp_path, monkeypatch):
    from mnemic.train.preflight import check_environment

    tokens = {**KINDS["gone"], "score": "predictor", "score_path": str(tmp_path / "none")}
    with pytest.raises(UserError, match=r"tokens.score_path: .* not found"):
        check_environment(build_recipe(tree_of(tmp_path, "gone", tokens=tokens)))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="tokens=none, or launch with DDP"):
        check_environment(build_recipe(tree_of(tmp_path, "gone")))


@pytest.mark.parametrize("block, said", [(4, False), (64, True)])
def test_rows_too_short_to_drop_anything_say_so(tmp_path, caplog, block, said):
    logging.getLogger("mnemic").propagate = True
    rows, _ = run(tmp_path, "protect", tokens={"kind": "protect", "block": block, "keep": 0.3})
    assert all((row["tokens/kept"] == 1) == said for row in rows if row["step"])
    assert ("tokens had no effect: every token was kept in every step" in caplog.text) == said
