"""Token sparsity over a streamed model: what the plain trainer does."""

import copy
from dataclasses import replace

import pytest
import torch
from streaming import Batches, train_in_memory, train_streamed
from support import lm_tree, merge, rows_of, sft_tree, train_here, weights_of

from mnemic.models.tiny import byte_tokenizer
from mnemic.models.tokens import selected
from mnemic.models.tokens.config import TokensConfig
from mnemic.train.errors import RecipeError
from mnemic.train.plan.shapes import Shape, Shapes
from mnemic.train.plan.techniques import kept_count
from mnemic.train.plan.ways import Planner, Way
from mnemic.train.recipe.load import build_recipe

KINDS = {
    "protect": {"kind": "protect", "block": 4, "keep": 0.3},
    "lemo's score": {"kind": "protect", "block": 4, "keep": 0.3, "score": "lemo"},
    "late layers": {"kind": "protect", "block": 4, "keep": 0.3, "layers": "late"},
    "token_tune": {"kind": "token_tune", "keep": 0.3},
}
LORA = {"adapters": {"kind": "lora", "r": 4, "freeze_a": True}}
STREAMED = {"update": {"kind": "streamed"}, "offload": {"kind": "ssd"}}


def tree_of(folder, tokens, changes):
    folder.mkdir()
    base = {
        "model": {"layers": 4, "max_position": 64}, "tokens": tokens,
        "loop": {"steps": 5, "batch_size": 6, "schedule": "constant"},
    }  # fmt: skip
    return merge(sft_tree(folder, **copy.deepcopy(base)), copy.deepcopy(changes))


def run(folder, tokens, *changes):
    merged = {}
    for change in changes:
        merge(merged, copy.deepcopy(change))
    train_here(tree_of(folder, tokens, merged))
    return rows_of(folder / "run"), weights_of(folder / "run" / "final")


CONFIG = TokensConfig(keep=0.3, block=4, layers="all", grad="selected")
CONFIGS = {
    "protect": CONFIG,
    "a score before the layers": replace(CONFIG, score="lemo"),
    "late layers": replace(CONFIG, layers="late"),
    "random tokens": replace(CONFIG, score="random", block=1, sinks=0, recent=0),
}


@pytest.mark.parametrize("rule", ["adamw", "mini"])
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_the_weights_are_the_plain_trainers(tmp_path, kind, rule):
    """To the last bit, padded rows, two micro-batches: each is chosen for by its own forward."""
    objective, tokens = Batches(2, padded=True), CONFIGS[kind]
    losses, weights, _ = train_in_memory("llama_tied", rule, objective, 5, tokens=tokens)
    found = train_streamed("llama_tied", rule, objective, 5, tmp_path, tokens=tokens)
    assert found[0] == pytest.approx(losses, rel=1e-6)
    assert all(torch.equal(found[1][n], w) for n, w in weights.items())
    dense = train_streamed("llama_tied", rule, objective, 5, tmp_path / "dense")
    assert dense[0][0] == found[0][0], "the forward is exact"
    assert not all(torch.equal(dense[1][n], w) for n, w in weights.items()), "all tokens chosen?"


@pytest.mark.parametrize("name", ["qwen3", "gpt2", "mixtral", "gemma2"])
def test_other_architectures(tmp_path, name):
    objective = Batches(1, padded=True)
    losses, weights, _ = train_in_memory(name, "adamw", objective, 3, tokens=CONFIG)
    found = train_streamed(name, "adamw", objective, 3, tmp_path, tokens=CONFIG)
    assert found[0] == pytest.approx(losses, rel=1e-6)
    assert all(torch.equal(found[1][n], w) for n, w in weights.items())


def test_a_step_that_is_taken_back_draws_the_same_tokens(tmp_path):
    """Speculative clipping runs a step twice; both times it is the plain trainer's."""
    objective, tokens = Batches(2, padded=True), CONFIGS["random tokens"]
    limit = {"max_grad_norm": 0.1, "tokens": tokens}
    _, weights, norms = train_in_memory("llama", "adamw", objective, 3, **limit)
    found = train_streamed("llama", "adamw", objective, 3, tmp_path, clip="speculative", **limit)
    assert min(norms) > 0.1
    assert found[2] == pytest.approx(norms, rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(found[1][name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("adapters", [{}, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_run_reports_what_the_plain_one_does(tmp_path, kind, adapters):
    rows, _ = run(tmp_path / "plain", KINDS[kind], adapters)
    again, _ = run(tmp_path / "streamed", KINDS[kind], adapters, STREAMED)
    assert [row.keys() for row in again] == [row.keys() for row in rows]
    for row, expected in zip(again, rows, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-3)
        for key in row:
            if key.startswith("tokens"):
                # Round-off decides between tokens that are attended to alike.
                assert row[key] == pytest.approx(expected[key], rel=0.1), key
    assert all(0 < row["tokens/kept"] < 1 for row in rows)
    assert all(row["tokens/supervised_dropped"] == 0 for row in rows)


def test_the_backward_runs_selected_tokens_only(tmp_path, monkeypatch):
    seen = []
    own = selected.attend_from

    def look(layer, hidden, *args, **kwargs):
        seen.append(hidden.shape[1])
        return own(layer, hidden, *args, **kwargs)

    monkeypatch.setattr(selected, "attend_from", look)
    rows, _ = run(tmp_path / "streamed", KINDS["protect"], STREAMED, {"loop": {"steps": 2}})
    assert len(seen) == 2 * 4
    assert max(seen) < 20, "rows are some 20 tokens long"
    assert rows[-1]["tokens/kept"] < 1


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        ({"kind": "drop"}, "shortens what is passed from layer to layer"),
        ({"kind": "lemo"}, "shortens what is passed from layer to layer"),
        ({"kind": "protect", "protect": False}, "set tokens.loss=all"),
        ({"kind": "protect", "probe_every": 2}, "never holds"),
    ],
)
def test_what_does_not_go_is_one_sentence(tmp_path, tokens, says):
    with pytest.raises(RecipeError, match=says):
        build_recipe(tree_of(tmp_path / "run", tokens, STREAMED))


def test_every_token_supervised_is_still_refused(tmp_path):
    with pytest.raises(RecipeError, match="nothing would be dropped"):
        build_recipe(lm_tree(tmp_path, tokens={"kind": "protect"}, **STREAMED))


def test_the_plan_counts_selected_tokens(tmp_path):
    """Fewer tokens, a smaller backward, and the count that `kept_tokens` has for a model in
    memory.
    """
    found = {}
    shape = Shape(1, 512, columns=8)
    for keep in (0.1, 0.5, None):
        tokens = {"kind": "none"} if keep is None else {"kind": "protect", "keep": keep, "block": 8}
        changes = {**STREAMED, "model": {"hidden_size": 64, "max_position": 512}}
        recipe = build_recipe(tree_of(tmp_path / str(keep), tokens, changes))
        planner = Planner(recipe, byte_tokenizer(), torch.device("cpu"), 0)
        way = Way("streamed", [])
        planner.fill(way, recipe, Shapes([shape]))
        found[keep] = way.host["activations"]
        if keep:
            assert kept_count(recipe, shape) == (56 if keep == 0.1 else 256)
    assert found[0.1] < found[0.5] < found[None]
