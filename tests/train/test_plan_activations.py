"""Activations counted on fake tensors against those of real runs, and against published figures."""

import json
import time
from contextlib import contextmanager

import pytest
import torch
from support import lm_tree, merge, sft_tree, write_recipe
from torch.utils.checkpoint import set_checkpoint_early_stop

from mnemic.models.exact.loss import loss_head
from mnemic.models.tiny import byte_tokenizer
from mnemic.train.build import build_model
from mnemic.train.cli import main
from mnemic.train.offload.skeleton import without_weights
from mnemic.train.plan import combinations
from mnemic.train.plan.activations import count_activations
from mnemic.train.plan.combinations import activations
from mnemic.train.plan.live import Fake, Live, fake
from mnemic.train.plan.machine import resident_bytes
from mnemic.train.plan.saved import component_of, components
from mnemic.train.plan.shapes import Shape
from mnemic.train.plan.show_activations import recommendation
from mnemic.train.plan.sizes import empty_model
from mnemic.train.plan.techniques import EXACT, OFF, SPARSE, changed, has, techniques
from mnemic.train.recipe.load import build_recipe, dump_recipe

CPU = torch.device("cpu")
TOKENIZER = byte_tokenizer()
GIB = 1 << 30
SHAPE = {
    "model": {"hidden_size": 128, "layers": 2, "heads": 4},
    "loop": {"batch_size": 2},
    "objective": {"seq_len": 128},
}
LLAMA_2_7B = {
    "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000,
}  # fmt: skip
LLAMA_3_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "rope_theta": 500000.0, "max_position_embeddings": 131072,
}  # fmt: skip
QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]


class Real(Fake):
    """The same counters over tensors with content."""

    @contextmanager
    def mode(self):
        with Live(self.own) as live, set_checkpoint_early_stop(False):
            yield live


def both(tree, shape=None):
    """(counted on fake tensors, counted on real ones)"""
    recipe = build_recipe(tree)
    shape = shape or Shape(recipe.loop.batch_size, recipe.objective.seq_len)
    empty = empty_model(recipe, TOKENIZER, CPU)
    techniques(recipe, empty, TOKENIZER)
    planned = count_activations(fake(empty, CPU, recipe.loop.precision), shape)
    real = build_model(recipe, TOKENIZER)
    measured = count_activations(Real(real, CPU, recipe.loop.precision, None), shape)
    return planned, measured


# Against real tensors ----------------------------------------------------------------------------


REAL = [(False, "fp32", "lora"), (True, "bf16", "lora"), (False, "bf16", "none")]
REST = [
    (checkpointing, dtype, adapters)
    for checkpointing in (False, True) for dtype in ("fp32", "bf16")
    for adapters in ("none", "lora") if (checkpointing, dtype, adapters) not in REAL
]  # fmt: skip


@pytest.mark.parametrize(
    ("checkpointing", "dtype", "adapters"),
    [*REAL, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)],
)
def test_the_count_is_that_of_a_real_run(checkpointing, dtype, adapters, tmp_path):
    loop = {"gradient_checkpointing": checkpointing, "precision": dtype}
    changes = {"model": {"dtype": dtype}, "adapters": {"kind": adapters}, "loop": loop}
    planned, measured = both(lm_tree(tmp_path, **merge(changes, SHAPE)))
    assert planned.by_component == measured.by_component
    assert planned.saved == sum(planned.by_component.values()) > 1 << 19
    assert planned.flops == measured.flops
    assert planned.peak == pytest.approx(measured.peak, rel=0.01)
    assert planned.peak > planned.saved
    inputs = 2 * 2 * 128 * 128 * (4 if dtype == "fp32" else 2)
    assert planned.by_component["layer inputs"] == (inputs if checkpointing else 0)


def test_only_columns_with_targets_and_padded_rows(tmp_path):
    shape = Shape(2, 96, columns=8, padded=True)
    planned, measured = both(lm_tree(tmp_path, **SHAPE), shape)
    whole, _ = both(lm_tree(tmp_path, **SHAPE), Shape(2, 96, padded=True))
    assert planned == measured
    assert planned.by_component["head and loss"] < whole.by_component["head and loss"] / 4


def test_recomputing_costs_a_forward(tmp_path):
    dense, _ = both(lm_tree(tmp_path, **SHAPE))
    tree = lm_tree(tmp_path, **merge({"loop": {"gradient_checkpointing": True}}, SHAPE))
    again, _ = both(tree)
    # A backward is two forwards; head and loss are not run again.
    assert 1.2 < again.flops / dense.flops < 1.34
    assert again.saved < dense.saved / 4


@pytest.mark.parametrize(
    ("name", "component"),
    [
        ("model.layers.3.self_attn.q_proj", "attention"),
        ("model.layers.3.self_attn.q_norm", "norms"),
        ("base_model.model.model.layers.0.mlp.up_proj.lora_A.default", "adapters"),
        ("transformer.h.0.attn.c_attn", "attention"),
        ("transformer.h.0.ln_1", "norms"),
        ("transformer.wte", "embedding"),
        ("model.decoder.layers.0.fc1", "MLP"),
        ("model.layers.0.block_sparse_moe.experts.1.w1", "MLP"),
        ("lm_head", "head and loss"),
        ("base_model.model.model.layers.0", None),
    ],
)
def test_names_say_what_a_module_is(name, component):
    assert component_of(name) == component


def test_a_layer_saves_its_input_and_the_outside_is_the_head(tmp_path):
    tree = lm_tree(tmp_path, **merge({"adapters": {"kind": "lora"}}, SHAPE))
    model = build_model(build_recipe(tree), TOKENIZER)
    found = {name: components(model)[module] for name, module in model.named_modules()}
    assert found[""] == found["base_model.model"] == "head and loss"
    assert found["base_model.model.model"] == found["base_model.model.model.layers.1"]
    assert found["base_model.model.model.layers.1"] == "layer inputs"


# Against published figures -----------------------------------------------------------------------


def llama_with_lora(autocast_adapter_dtype):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig

    model = without_weights(LlamaConfig(**LLAMA_2_7B), torch.bfloat16)
    config = LoraConfig(r=8, target_modules=QKVO, task_type="CAUSAL_LM")
    return get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)


@pytest.mark.parametrize(
    ("fp32_adapters", "gib"),
    [(True, 49.30), pytest.param(False, 35.3, marks=pytest.mark.slow)],
    ids=["peft's fp32", "bf16"],
)
def test_llama_2_7b_at_8k_saves_what_lemo_logged(fp32_adapters, gib):
    """49.14 in LeMo's log, which does not count everything; 49.30 and 35.3 counted
    before by another tracker, with inputs that require gradients.
    """
    model = llama_with_lora(fp32_adapters)
    model.enable_input_require_grads()
    loss_head(model.get_base_model(), "logits")
    faked = fake(model, CPU, "fp32")
    start = time.monotonic()
    found = count_activations(faked, Shape(1, 8192))
    assert time.monotonic() - start < 60
    assert found.saved / GIB == pytest.approx(gib, rel=0.001)
    # Gate, its activation, up, and their product's inputs: three of 11,008 in bf16.
    three = 32 * 8192 * 3 * 11008 * 2
    assert found.by_component["MLP"] == three
    assert found.by_component["other"] == 0


# The command -------------------------------------------------------------------------------------


def config_only(folder, config):
    from transformers import LlamaConfig

    LlamaConfig(**config).save_pretrained(folder / "model")
    return {"kind": "pretrained", "path": str(folder / "model"), "dtype": "bf16"}


@pytest.fixture
def few(monkeypatch):
    """Three rows, for the sake of time."""
    names = ("dense", "every 2nd layer recomputed", "checkpointing")
    monkeypatch.setattr(combinations, "EXACT", {n: EXACT[n] for n in names})


@pytest.mark.slow
def test_the_command_names_the_cheapest_that_fits(tmp_path, capsys, few):
    path = str(write_recipe(tmp_path / "recipe.yaml", lm_tree(tmp_path, **SHAPE)))
    ask = ["plan", path, "--activations", "--length"]
    assert main([*ask, "64,128", "--budget", "1GiB"]) == 0
    text = capsys.readouterr().out
    assert "GiB saved" in text and "dense *" in text and "checkpointing" in text
    assert text.count("the cheapest exact combination is dense, this recipe's") == 2
    assert main(["plan", path, "--budget", "1GiB"]) == 2
    assert main([*ask, "128", "--budget", "much"]) == 2


def test_the_command_gives_json(tmp_path, capsys, few):
    path = str(write_recipe(tmp_path / "recipe.yaml", lm_tree(tmp_path, **SHAPE)))
    assert main(["plan", path, "--activations", "--budget", "1GiB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in found["combinations"]}
    saved = {name: row["counted"]["128"]["saved"] for name, row in rows.items()}
    assert rows["dense"]["chosen"] and not rows["checkpointing"]["chosen"]
    assert saved["dense"] > saved["every 2nd layer recomputed"] > saved["checkpointing"]
    assert found["fits"] == {"128": []}


@pytest.mark.slow
def test_every_combination_runs_and_tokens_are_the_last_resort(tmp_path):
    """Long enough for tiles and chunks to matter; nothing fits into one byte."""
    changes = {"model": {"hidden_size": 64, "layers": 4, "max_position": 16384}}
    changes["loop"] = {"batch_size": 1}
    recipe = build_recipe(sft_tree(tmp_path, adapters={"kind": "lora"}, **changes))
    table = activations(recipe, lengths=[16384], budget=1)
    rows = {row.name: row for row in table.combinations}
    assert not any(row.refused for row in rows.values())
    # Of a byte vocabulary all logits are few: no row without them.
    checkpointing = "checkpointing, all logits"
    assert set(rows) >= {*SPARSE, "MLP in tiles", checkpointing, "layers in chunks"}
    # Not layers in chunks: beside a width of 64 a chunk's mask, chunk x row, is large.
    assert table.smallest(16384) is rows["checkpointing, MLP in tiles"]
    # Tiles are smaller than anything here; among the others tokens are the last resort.
    table.combinations = [rows[name] for name in (checkpointing, *SPARSE)]
    table.budget = rows[checkpointing].need(16384)
    assert table.cheapest(16384) is rows[checkpointing]
    table.budget -= 1
    cheapest = table.cheapest(16384)
    assert cheapest is not None and not cheapest.exact
    assert "does, and drops tokens" in recommendation(table, 16384)
    half = rows["checkpointing, half of tokens"].counted[16384]
    whole = rows[checkpointing].counted[16384]
    assert half.by_component["layer inputs"] < 0.7 * whole.by_component["layer inputs"]


def test_recommendations_go_from_cheap_to_small(tmp_path, few):
    table = activations(build_recipe(lm_tree(tmp_path, **SHAPE)), lengths=[512], budget=1 << 40)
    rows = {row.name: row for row in table.combinations}
    assert not any(row.refused for row in rows.values())
    table.budget = rows["dense"].need(512)
    assert table.cheapest(512) is rows["dense"]
    table.budget -= 1
    cheapest = table.cheapest(512)
    assert cheapest is rows["every 2nd layer recomputed"]
    table.budget = min(row.need(512) for row in table.combinations) - 1
    assert table.cheapest(512) is None
    assert "no exact combination fits, the smallest is" in recommendation(table, 512)


def test_every_combination_is_in_reach_of_a_recipe(tmp_path):
    """A key that was renamed would leave its row out without a word."""
    recipe = build_recipe(sft_tree(tmp_path, adapters={"kind": "lora"}))
    tree = dump_recipe(recipe)
    for overrides in (OFF, *EXACT.values(), *SPARSE.values()):
        assert all(has(tree, key) for key in overrides if key != "tokens.keep")
        changed(recipe, {k: v(64) if callable(v) else v for k, v in overrides.items()})


@pytest.mark.slow
def test_the_recipe_s_own_combination_has_a_row(tmp_path, few):
    changes = {"loop": {"loss": "logits"}, "update": {"kind": "in_backward"}}
    table = activations(build_recipe(sft_tree(tmp_path, **changes)))
    assert table.own.name == "as the recipe has it"
    assert table.own.freed and set(table.own.counted) == set(table.lengths) == {16}


@pytest.mark.slow
def test_a_streamed_recipe_is_counted_in_memory(tmp_path, few):
    changes = {"update": {"kind": "streamed"}, "offload": {"kind": "ssd", "activations": "ssd"}}
    table = activations(build_recipe(lm_tree(tmp_path, **changes)))
    assert "update=plain" in table.notes[0] and "offload.activations=ssd" in table.notes[1]


def test_a_model_that_needs_values_is_refused(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise RuntimeError("aten.nonzero needs values")

    monkeypatch.setattr(combinations, "count_activations", refuse)
    path = write_recipe(tmp_path / "recipe.yaml", lm_tree(tmp_path))
    assert main(["plan", str(path), "--activations"]) != 0
    assert "does not run without values (aten.nonzero" in capsys.readouterr().err


@pytest.mark.slow
def test_an_8b_model_at_128k_is_counted_in_seconds_and_no_memory(tmp_path):
    changes = {
        "model": config_only(tmp_path, LLAMA_3_8B),
        "adapters": {"kind": "lora", "r": 8, "target_modules": QKVO},
        "loop": {"batch_size": 1},
    }
    recipe = build_recipe(lm_tree(tmp_path, **changes))
    activations(recipe, lengths=[64])  # imports and one small run
    before, start = resident_bytes() or 0, time.monotonic()
    table = activations(recipe, lengths=[131072])
    each = (time.monotonic() - start) / len(table.combinations)
    assert each < 30
    assert (resident_bytes() or 0) - before < GIB
    rows = {row.name: row.counted[131072] for row in table.combinations if row.counted}
    inputs = 32 * 131072 * 4096 * 2
    assert rows["checkpointing"].by_component["layer inputs"] == inputs
    assert rows["dense"].saved > 10 * inputs
