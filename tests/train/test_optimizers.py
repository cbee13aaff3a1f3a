"""Every optimizer of the recipe: it learns, comes back to the same bits, runs inside the backward
to the same bits, follows the schedule; and what is refused.
"""

import importlib.util
import logging
import re

import pytest
import torch
from support import lm_tree, rows_of, same_weights, train_here, weights_of

from mnemic.models.tiny import byte_tokenizer
from mnemic.train.build import build_model
from mnemic.train.errors import RecipeError, UserError
from mnemic.train.optimizers import build_optimizer
from mnemic.train.preflight import check_environment
from mnemic.train.recipe.load import build_recipe

# Kind -> settings, and the state of a matrix (88 x 32, rank 8) and of the embedding (261 x 32).
KINDS = {
    "adamw": ({"lr": 3e-3}, {"exp_avg": (88, 32)}, {"exp_avg": (261, 32)}),
    "adamw8bit": ({"lr": 3e-3}, {"state1": (88, 32)}, {"state1": (261, 32)}),
    "sgd": ({"lr": 0.3, "momentum": 0.9}, {"momentum_buffer": (88, 32)}, {}),
    "adafactor": ({"lr": 3e-2}, {"row_var": (88, 1), "col_var": (1, 32)}, {"row_var": (261, 1)}),
    "muon": ({"lr": 1e-2}, {"momentum_buffer": (88, 32)}, {"exp_avg": (261, 32)}),
    "galore": (
        {"lr": 1e-2, "rest_lr": 3e-3, "update_proj_gap": 3},
        {"exp_avg": (88, 8), "projection": (8, 32)},
        {"exp_avg": (261, 32)},
    ),
    "apollo": (
        {"lr": 3e-3, "update_proj_gap": 3},
        {"exp_avg": (88, 8), "prev_norm": ()},
        {"exp_avg": (261, 32)},
    ),
    "apollo_mini": ({"lr": 3e-3}, {"exp_avg": (88, 1)}, {"exp_avg": (261, 32)}),
}
kinds = pytest.mark.parametrize("kind", list(KINDS))


def tree_of(folder, kind, name="run", **changes):
    optimizer = {"kind": kind, "weight_decay": 0.01, **KINDS[kind][0]}
    loop = {"schedule": {"kind": "constant", "warmup": 2}, **changes.pop("loop", {})}
    return lm_tree(
        folder, run_dir=str(folder / name), optimizer=optimizer, loop=loop, **changes
    )  # fmt: skip


def saved(folder, step=8):
    """Weights and optimizer state of a checkpoint, as a resumed run reads them."""
    path = folder / "checkpoints" / f"step-{step:08d}"
    state = torch.load(path / "trainer.pt", weights_only=True)
    return weights_of(path), state["optimizer"]


def flat(state):
    """Tensors of one parameter's state; bitsandbytes nests them."""
    found = {}
    for key, value in state.items():
        if isinstance(value, dict):
            found |= flat(value)
        elif isinstance(value, torch.Tensor):
            found[key] = value
    return found


def same_state(a, b):
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys() and a["state"]
    for key, state in a["state"].items():
        other = flat(b["state"][key])
        assert flat(state).keys() == other.keys()
        for name, value in flat(state).items():
            assert torch.equal(value, other[name]), (key, name)
        numbers = {k: v for k, v in state.items() if isinstance(v, (int, float))}
        assert numbers == {k: b["state"][key][k] for k in numbers}


def state_by_name(optimizer):
    names = [n for g in optimizer["param_groups"] for n in g["param_names"]]
    ids = [i for g in optimizer["param_groups"] for i in g["params"]]
    return {n: flat(optimizer["state"].get(i, {})) for n, i in zip(names, ids, strict=True)}


@kinds
def test_it_learns_and_a_stopped_run_comes_back_to_the_same_bits(tmp_path, kind):
    whole, broken = tree_of(tmp_path, kind, "whole"), tree_of(tmp_path, kind, "broken")
    train_here(whole)
    # Step 5 needs what earlier steps drew: GaLore decomposes at 1, 3, 6, APOLLO draws at 1, 4, 7.
    train_here(tree_of(tmp_path, kind, "broken", loop={"steps": 4, "save_every": 100}))
    train_here(broken)
    rows = rows_of(tmp_path / "whole")
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.15
    assert rows_of(tmp_path / "broken") == rows
    weights, optimizer = saved(tmp_path / "whole")
    again, resumed = saved(tmp_path / "broken")
    assert same_weights(weights, again)
    same_state(optimizer, resumed)

    state = state_by_name(optimizer)
    _, matrix, embedding = KINDS[kind]
    for name, shapes in (
        ("model.layers.0.mlp.up_proj.weight", matrix),
        ("model.embed_tokens.weight", embedding),
    ):
        found = {key: tuple(value.shape) for key, value in state[name].items()}
        assert shapes.items() <= found.items(), name


def test_8bit_moments_are_bytes(tmp_path):
    train_here(tree_of(tmp_path, "adamw8bit"))
    state = state_by_name(saved(tmp_path / "run")[1])["model.embed_tokens.weight"]
    assert state["state1"].dtype == state["state2"].dtype == torch.uint8


@pytest.mark.parametrize("r, said", [(4, True), (128, False)])
def test_8bit_moments_that_are_none_say_so(tmp_path, caplog, r, said):
    """Adapters are small: of 4 x 32 elements all moments are fp32, of 128 x 32 none."""
    logging.getLogger("mnemic").propagate = True
    train_here(tree_of(tmp_path, "adamw8bit", adapters={"kind": "lora", "r": r}))
    assert ("optimizer.kind=adamw8bit has no effect here" in caplog.text) == said


@kinds
def test_inside_the_backward_it_is_the_plain_update_bit_for_bit(tmp_path, kind):
    plain = {"kind": "plain", "max_grad_norm": None}
    train_here(tree_of(tmp_path, kind, "plain", update=plain))
    train_here(tree_of(tmp_path, kind, "inside", update={"kind": "in_backward"}))
    weights, optimizer = saved(tmp_path / "plain")
    again, inside = saved(tmp_path / "inside")
    assert same_weights(weights, again)
    same_state(optimizer, inside)


@kinds
def test_each_group_has_its_peak_rate_times_the_factor(tmp_path, kind):
    tree = tree_of(
        tmp_path, kind, loop={"steps": 4, "schedule": {"kind": "constant", "warmup": 8}}
    )  # fmt: skip
    rest = {"rest_lr": 0.002} if kind in ("muon", "galore", "apollo", "apollo_mini") else {}
    tree["optimizer"] |= rest
    train_here(tree)
    peak = tree["optimizer"]["lr"]
    factor = 4 / 9
    groups = saved(tmp_path / "run", 4)[1]["param_groups"]
    for group in groups:
        outside = rest and not any("_proj" in name for name in group["param_names"])
        assert group["lr"] == pytest.approx(factor * (0.002 if outside else peak))
    assert rows_of(tmp_path / "run")[-1]["lr"] == pytest.approx(factor * peak)


@kinds
def test_vectors_do_not_decay(tmp_path, kind):
    recipe = build_recipe(tree_of(tmp_path, kind))
    optimizer = build_optimizer(recipe.optimizer, build_model(recipe, byte_tokenizer()))
    for group in optimizer.param_groups:
        for param in group["params"]:
            assert group["weight_decay"] == (0.01 if param.ndim >= 2 else 0.0)


@pytest.mark.parametrize("kind", ["muon", "galore", "apollo", "apollo_mini"])
def test_the_table_of_groups_is_logged_with_exact_bytes(tmp_path, kind, caplog):
    with caplog.at_level(logging.INFO, "mnemic"):
        train_here(tree_of(tmp_path, kind))
    head = next(i for i, m in enumerate(caplog.messages) if m.startswith("rule  "))
    lines = []
    for message in caplog.messages[head + 1 :]:
        found = re.match(r"(\S+)(?: rank \S+)?\s+(\d+)\s+([\d,]+)\s+([\d,]+)  \S", message)
        if not found:
            break
        lines.append([found[1], *(int(x.replace(",", "")) for x in found.groups()[1:])])
    low = "apollo" if kind.startswith("apollo") else kind
    # k and v have half the rows, so that a share of them is another rank of GaLore's.
    body = {"galore": [2, 5]}.get(kind, [7])
    rules = [low] * len(body) + ["adamw"] * (len(lines) - len(body))
    assert [line[0] for line in lines] == rules
    assert [line[1] for line in lines[: len(body)]] == body, "q, k, v, o, gate, up, down"
    assert len(lines) > len(body)
    weights, optimizer = saved(tmp_path / "run")
    assert sum(line[2] for line in lines) == sum(w.numel() for w in weights.values())
    held = sum(t.nbytes for s in state_by_name(optimizer).values() for t in s.values())
    assert sum(line[3] for line in lines) == held


def test_role_decides_not_shape_so_the_head_and_the_embedding_are_adamws(tmp_path):
    tree = tree_of(tmp_path, "muon")
    recipe = build_recipe(tree)
    model = build_model(recipe, byte_tokenizer())
    optimizer = build_optimizer(recipe.optimizer, model)
    names = [n for g in optimizer.param_groups if g["use_muon"] for n in g["param_names"]]
    assert len(names) == 7 and all("_proj" in name for name in names)


@pytest.mark.parametrize("kind", ["muon", "galore"])
@pytest.mark.parametrize(
    ("coverage", "trained", "share"),
    [(0.5, "norm", "0 of the 96"), (1.0, "", "11,520 of the 11,616")],
)
def test_a_model_with_few_matrices_is_refused(tmp_path, kind, coverage, trained, share):
    tree = tree_of(tmp_path, kind)
    tree["optimizer"]["min_coverage"] = coverage
    recipe = build_recipe(tree)
    model = build_model(recipe, byte_tokenizer())
    for name, param in model.named_parameters():
        param.requires_grad = trained in name
    sentence = rf"kind={kind} would have {share} .* at least {coverage:.0%} .*take apollo"
    with pytest.raises(UserError, match=sentence):
        build_optimizer(recipe.optimizer, model)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"patterns": [{"match": "*.mpl.*", "lr": 1.0}]},
            r"optimizer: pattern '\*\.mpl\.\*' takes nothing: no trainable parameter has that name",
        ),
        (
            {"patterns": [{"match": "role:matrix"}, {"match": "*.mlp.*"}]},
            r"pattern '\*\.mlp\.\*' takes nothing: all 3 parameters it matches are taken",
        ),
        (
            {"patterns": [{"match": "*.mlp.*", "rule": "adamw"}], "min_coverage": 0.9},
            r"optimizer: the low-rank rule would have .* at least 90% of them is expected",
        ),
    ],
)
def test_patterns_that_cannot_be_meant_stop_the_run(tmp_path, settings, sentence):
    tree = tree_of(tmp_path, "apollo")
    tree["optimizer"] |= settings
    with pytest.raises(UserError, match=sentence):
        train_here(tree)


@pytest.mark.parametrize(
    ("kind", "library"),
    [("adamw8bit", "bitsandbytes"), ("muon", "pytorch_optimizer"), ("galore", "pytorch_optimizer")],
)
def test_a_missing_library_is_one_sentence(tmp_path, monkeypatch, kind, library):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == library else find(name, *a)
    )
    sentence = rf"optimizer\.kind={kind} needs {library}: pip install 'mnemic\[optimizers\]'"
    with pytest.raises(UserError, match=sentence):
        train_here(tree_of(tmp_path, kind))
    check_environment(build_recipe(tree_of(tmp_path, "adafactor")))


@kinds
def test_engines_that_cannot_run_an_optimizer_refuse_it(tmp_path, monkeypatch, kind):
    recipe = build_recipe(tree_of(tmp_path, kind))

    def refused(sentence=None, **env):
        with monkeypatch.context() as patch:
            for name, value in env.items():
                patch.setenv(name, value)
            if sentence is None:
                check_environment(recipe)
                return
            with pytest.raises(UserError, match=sentence):
                check_environment(recipe)

    deepspeed = {"ACCELERATE_USE_DEEPSPEED": "true"}
    offload = {**deepspeed, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}
    fsdp = {"ACCELERATE_USE_FSDP": "true"}
    flattens = rf"kind={kind} does not work under DeepSpeed, .*; set optimizer\.kind=adamw, or"
    refused(None if kind in ("adamw", "sgd") else flattens, **deepspeed)
    refused(None if kind == "adamw" else flattens, **offload)
    whole = None if kind in ("adamw", "sgd") or kind.startswith("apollo") else "needs whole tensors"
    refused(whole, **fsdp, FSDP_VERSION="2")
    refused("FSDP 1 flattens" if whole is None else whole, **fsdp)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"rank": 0}, r"^optimizer\.rank: 0 is not a whole number from 1, or a share of [^\n]*$"),
        ({"rank": "x"}, r"^optimizer\.rank: 'x' is not a whole number from 1[^\n]*$"),
        ({"scale": "aut"}, r"^optimizer\.scale: 'aut' is not auto, or a number above 0$"),
        (
            {"patterns": [{"match": "*", "rank": 1.5}]},
            r"^optimizer\.patterns\.0\.rank: 1\.5 is not a whole number from 1[^\n]*$",
        ),
    ],
)
def test_a_value_of_two_types_has_one_sentence(tmp_path, settings, sentence):
    with pytest.raises(RecipeError, match=sentence):
        build_recipe(tree_of(tmp_path, "apollo") | {"optimizer": {"kind": "apollo", **settings}})


def test_an_unknown_kind_names_all(tmp_path):
    with pytest.raises(RecipeError, match="'addam' is not one of adamw, adamw8bit, sgd, adafactor"):
        build_recipe(lm_tree(tmp_path, optimizer={"kind": "addam"}))


def test_settings_that_do_nothing_are_named(tmp_path, caplog):
    tree = tree_of(tmp_path, "apollo")
    tree["optimizer"] |= {"proj": "gaussian", "proj_entries": 2}
    with pytest.raises(UserError, match="proj_entries=2 is for proj=sparse"):
        build_recipe(tree)
    tree["optimizer"] |= {"proj": "sparse", "proj_entries": 1, "cache_projection": True}
    recipe = build_recipe(tree)
    with caplog.at_level(logging.WARNING, logger="mnemic"):
        build_optimizer(recipe.optimizer, build_model(recipe, byte_tokenizer()))
    assert "cache_projection has no effect" in caplog.text


def test_a_run_refused_for_its_patterns_can_be_mended_and_run_again(tmp_path):
    """In the same folder: nothing was trained there."""
    tree = tree_of(tmp_path, "apollo")
    tree["optimizer"]["patterns"] = [{"match": "*.nope.*"}]
    with pytest.raises(UserError, match="takes nothing"):
        train_here(tree)
    tree["optimizer"]["patterns"] = [{"match": "*.mlp.*", "rank": 2}]
    assert train_here(tree)["steps"] == 8
    tree["optimizer"]["patterns"] = []
    with pytest.raises(UserError, match="holds a run of another recipe"):
        train_here(tree)


def test_a_scale_in_a_pattern_overrules_scale_sq(tmp_path):
    tree = tree_of(tmp_path, "apollo")
    patterns = [{"match": "*.mlp.*", "scale": 2.0}]
    tree["optimizer"] |= {"scale_sq": 9.0, "patterns": patterns}
    recipe = build_recipe(tree)
    groups = build_optimizer(
        recipe.optimizer, build_model(recipe, byte_tokenizer())
    ).param_groups  # fmt: skip
    found = {name: (g["scale"], g["scale_sq"]) for g in groups for name in g["param_names"]}
    assert found["model.layers.0.mlp.up_proj.weight"] == (2.0, None)
    assert found["model.layers.0.self_attn.q_proj.weight"] == ("auto", 9.0)


def test_accumulation_inside_the_backward_says_what_it_costs(tmp_path, caplog):
    tree = tree_of(tmp_path, "apollo", update="in_backward", loop={"micro_batch_size": 4})
    with caplog.at_level(logging.WARNING, logger="mnemic"):
        train_here(tree)
    assert "with 2 micro-batches holds all gradients until the last one" in caplog.text


@pytest.mark.parametrize(
    ("changes", "variable", "value", "message"),
    [
        ({"update": "in_backward"}, "ACCELERATE_USE_FSDP", "true", "set update.kind=plain"),
        ({"update": "in_backward"}, "ACCELERATE_USE_DEEPSPEED", "true", "set update.kind=plain"),
        ({"model": {"weights": "int8"}}, "WORLD_SIZE", "2", "trains in one process; launch one"),
    ],
)
def test_what_one_process_only_can_do_is_refused_before_anything_loads(
    tmp_path, monkeypatch, changes, variable, value, message
):
    monkeypatch.setenv("FSDP_VERSION", "2")
    kind = "adamw" if variable == "ACCELERATE_USE_DEEPSPEED" else "apollo"
    recipe = build_recipe(tree_of(tmp_path, kind, **changes))
    check_environment(recipe)
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=message):
        check_environment(recipe)
