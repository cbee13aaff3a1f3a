"""The plan against what it foretells: state bytes, moved bytes, peaks of real runs; refusals."""

import json
import os
import subprocess
import sys

import pytest
import torch
from memory_support import grpo_tree
from support import lm_tree, merge, rows_of, sft_tree, train_here, write_recipe

from mnemic.models.tiny import byte_tokenizer, tiny_llama
from mnemic.train import doctor
from mnemic.train.build import build_tokenizer
from mnemic.train.cli import main
from mnemic.train.errors import UserError
from mnemic.train.optimizers import build_optimizer
from mnemic.train.plan import fits, machine, ways
from mnemic.train.plan.fits import check_fits, least_bytes, neighbour
from mnemic.train.plan.machine import Machine, memory_limit
from mnemic.train.plan.plan import plan
from mnemic.train.plan.shapes import Shape, shapes_of
from mnemic.train.plan.sizes import empty_model, state_bytes, weight_bytes
from mnemic.train.recipe.load import build_recipe

CPU = torch.device("cpu")
TOKENIZER = byte_tokenizer()
LARGE = {
    "model": {"hidden_size": 128, "layers": 4, "heads": 4},
    "objective": {"seq_len": 256},
    "loop": {"batch_size": 16, "steps": 3, "save_every": 10},
}
LLAMA_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip
PARAMETERS_8B = 8_030_261_248


@pytest.fixture(autouse=True)
def small_measurements(monkeypatch):
    monkeypatch.setattr(doctor, "TEST_BYTES", 4 << 20)


def way(report, name):
    return next(w for w in report.ways if w.name == name)


# Sizes -------------------------------------------------------------------------------------------

OPTIMIZERS = [
    {"kind": "adamw"},
    {"kind": "adamw8bit"},
    {"kind": "sgd", "momentum": 0.9},
    {"kind": "sgd"},
    {"kind": "adafactor"},
    {"kind": "muon"},
    {"kind": "galore", "rank": 0.25},
    {"kind": "apollo", "rank": 0.25},
    {"kind": "apollo_mini", "rest": "adamw8bit"},
]


def tensors_in(state):
    for value in state.values():
        if isinstance(value, dict):
            yield from tensors_in(value)
        elif isinstance(value, torch.Tensor):
            yield value


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("part", OPTIMIZERS, ids=lambda p: "-".join(map(str, p.values())))
def test_state_bytes_are_those_of_the_optimizer_after_a_step(part, dtype, tmp_path):
    for key, library in (("adamw8bit", "bitsandbytes"), ("muon", "pytorch_optimizer")):
        if part["kind"] == key or (part["kind"] == "galore" and key == "muon"):
            pytest.importorskip(library)
    tree = lm_tree(tmp_path, model={"hidden_size": 64, "dtype": dtype}, optimizer=part)
    tree["optimizer"] = part
    recipe = build_recipe(tree)
    real = tiny_llama(TOKENIZER, hidden_size=64, layers=1, heads=2, max_position=64, seed=0)
    real.to(torch.float32 if dtype == "fp32" else torch.bfloat16)
    optimizer = build_optimizer(recipe.optimizer, real)
    ids = torch.randint(0, 255, (2, 16))
    real(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    tensors = {id(t): t for t in tensors_in(optimizer.state_dict()["state"])}.values()
    held = sum(t.nbytes for t in tensors)
    planned = state_bytes(recipe, empty_model(recipe, TOKENIZER, CPU))
    # Tables and counters of a few bytes a tensor are not counted.
    assert 0 <= held - planned <= (4096 + 8 * len(list(real.parameters())))


def test_weight_bytes(tmp_path):
    from mnemic.models.int8 import quantize_body
    from mnemic.optim.int8 import Int8Weight

    changes = {"model": {"weights": "int8", "dtype": "bf16"}, "optimizer": {"kind": "apollo_mini"}}
    recipe = build_recipe(lm_tree(tmp_path, **changes))
    real = tiny_llama(TOKENIZER, hidden_size=32, layers=1, heads=2, max_position=2048, seed=0)
    for param in real.parameters():
        param.data = param.data.bfloat16()
    quantize_body(real)
    held = sum(
        p.held_bytes if isinstance(p, Int8Weight) else p.nbytes
        for p in (*real.parameters(), *real.buffers())
    )
    assert weight_bytes(recipe, empty_model(recipe, TOKENIZER, CPU)) == held


def test_shapes_of_conversations_are_those_of_the_data(tmp_path):
    recipe = build_recipe(sft_tree(tmp_path, loop={"batch_size": 4, "micro_batch_size": 2}))
    found = shapes_of(recipe, TOKENIZER)
    assert len(found.step) == 2 and found.largest.rows == 2
    # "12 plus 6 is " and "18" are 15 tokens and an end.
    assert found.largest.width == 16 and found.largest.columns <= 4
    longer = shapes_of(recipe, TOKENIZER, 40)
    assert longer.largest == Shape(2, 40)
    (tmp_path / "rows.jsonl").unlink()
    blind = shapes_of(recipe, TOKENIZER)
    assert blind.largest == Shape(2, 64) and "not found" in blind.missing[0]


def test_shapes_of_a_bank_are_of_one_operation_each(tmp_path):
    ops = ["mem_extract", "mem_generate"]
    recipe = build_recipe(
        {**sft_tree(tmp_path, loop={"batch_size": 4, "micro_batch_size": 2}),
         "data": {"kind": "operations", "operations": ops, "size": 8},
         "objective": {"kind": "sft", "max_length": 1024},
         "adapters": {"kind": "bank", "operations": ops},
         "evaluation": {"data": {"kind": "operations", "operations": ops, "split": "heldout",
                                 "size": 3}, "batch_size": 2}}
    )  # fmt: skip
    found = shapes_of(recipe, TOKENIZER)
    assert len(found.step) in (2, 3) and found.largest.rows == 2
    assert found.evaluation is not None and found.evaluation.rows == 2


def test_shapes_of_rollouts_are_a_teachers(tmp_path, warm_model):
    recipe = build_recipe(grpo_tree(tmp_path, warm_model))
    tokenizer = build_tokenizer(recipe)
    found = shapes_of(recipe, tokenizer)
    most = recipe.objective.max_length
    assert 8 < found.largest.width < most and found.largest.columns < found.largest.width
    assert found.prompts.width < found.largest.width
    # Half as long again where that may be written, and no longer than a teacher's where it may not.
    short, long = (
        shapes_of(
            recipe.model_copy(
                update={"memory": recipe.memory.model_copy(update={"max_new_tokens": count})}
            ),
            tokenizer,
        ).largest
        for count in (1, most)
    )
    assert short.width < long.width < most
    assert long.columns - short.columns == long.width - short.width
    assert shapes_of(recipe, tokenizer, most).largest.width == most
    assert shapes_of(recipe, None).largest.width == most


# Peaks -------------------------------------------------------------------------------------------


def command(*args, cwd):
    done = subprocess.run(
        [sys.executable, "-m", "mnemic.train.cli", *args], cwd=cwd, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_peaks_of_real_runs_are_within_a_tenth_of_the_plan(tmp_path):
    recipe = str(write_recipe(tmp_path / "recipe.yaml", lm_tree(tmp_path, **LARGE)))
    found = json.loads(command("plan", recipe, "--json", cwd=tmp_path))
    planned = {w["name"]: w["host_bytes"] for w in found["ways"]}
    for name in ("plain", "streamed ssd"):
        update, offload = fits.WAYS[name]
        run = f"run_dir={tmp_path / update}"
        command("train", recipe, f"update={update}", f"offload={offload}", run, cwd=tmp_path)
        steps = [r for r in rows_of(tmp_path / update, perf=True) if r["step"] > 1]
        peak = max(row["perf/host_peak_bytes"] for row in steps)
        assert abs(planned[name] - peak) < 0.1 * peak, name


def test_an_8b_model_is_planned_without_its_weights(tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(**LLAMA_8B).save_pretrained(tmp_path / "model")
    changes = {
        "model": {"kind": "pretrained", "path": str(tmp_path / "model")},
        "optimizer": {"kind": "apollo_mini"},
        "loop": {"gradient_checkpointing": True, "precision": "bf16"},
    }
    recipe = build_recipe(lm_tree(tmp_path, **changes))
    before = machine.resident_bytes() or 0
    report = plan(recipe)
    assert (machine.resident_bytes() or 0) - before < 1 << 30
    assert report.parameters == PARAMETERS_8B
    assert way(report, "plain").host["weights"] - 2 * PARAMETERS_8B < 4096  # rotary buffers
    assert way(report, "plain").host_bytes > 4 * PARAMETERS_8B
    streamed = way(report, "streamed ssd")
    layers = (PARAMETERS_8B - 2 * 128256 * 4096) * 2
    # Two slots of 32 stay; APOLLO-Mini writes weights and little else.
    assert streamed.host["layers"] == pytest.approx(2 * layers / 32, rel=1e-3)
    moments = 2 * 128256 * 4096 * 8  # of embedding and head, which have AdamW
    assert streamed.written == pytest.approx(2 * PARAMETERS_8B + moments, rel=0.02)
    assert any("no tokenizer" in note for note in report.notes)


def test_longer_rows_take_more_and_only_what_grows_with_them(tmp_path):
    recipe = build_recipe(lm_tree(tmp_path, **LARGE))
    report = plan(recipe, lengths=[256, 512])
    totals = {
        n: t["plain"] - way(report, "plain").host["imports"] for n, t in report.totals.items()
    }
    assert 1.7 < totals[512] / totals[256] < 2.1
    # What malloc keeps of what was freed; it gives back in runs that are meant to take little.
    assert way(report, "plain").host["heap"] > 0 == way(report, "in_backward").host["heap"]


def test_a_model_that_needs_values_is_planned_by_formula(tmp_path, monkeypatch):
    recipe = build_recipe(lm_tree(tmp_path, **LARGE))
    exact = plan(recipe)

    def refuse(*_, **__):
        raise RuntimeError("aten.nonzero needs values")

    for name in ("training", "evaluating"):
        monkeypatch.setattr(ways, name, refuse)
    guessed = plan(recipe)
    assert "aten.nonzero" in guessed.notes[-1]
    for name in ("plain", "streamed ssd"):
        a, b = way(exact, name), way(guessed, name)
        assert a.host["imports"] and 0.4 < b.host["activations"] / a.host["activations"] < 2.5


# Disk and offload --------------------------------------------------------------------------------


def test_layer_inputs_past_the_budget_go_to_the_disk(tmp_path):
    streamed = {"update": {"kind": "streamed"}, "offload": {"kind": "ssd", "activations": "ssd"}}
    recipe = build_recipe(lm_tree(tmp_path, **merge(streamed, LARGE)))
    found = way(plan(recipe), "streamed ssd")
    inputs = 4 * 16 * 256 * 128 * 4
    assert found.host["layer inputs"] == 0 and found.disk["activations"] == inputs
    kept = recipe.model_copy(
        update={"offload": recipe.offload.model_copy(update={"activations": "device"})}
    )
    held = way(plan(kept), "streamed ssd")
    assert held.host["layer inputs"] == inputs and "activations" not in held.disk
    assert found.read - held.read == found.written - held.written == inputs


def test_store_and_checkpoint_are_the_sizes_of_the_files(tmp_path):
    changes = {"update": {"kind": "streamed"}, "offload": {"kind": "ssd"}, "loop": {"steps": 3}}
    tree = lm_tree(tmp_path, **changes)
    found = way(plan(build_recipe(tree)), "streamed ssd")
    train_here(tree)
    run = tmp_path / "run"
    assert (run / "offload" / "data.bin").stat().st_size == found.disk["store"]
    checkpoint = run / "checkpoints" / "step-00000003" / "offload.bin"
    assert checkpoint.stat().st_size == found.disk["checkpoints"]


# Neighbours and refusals -------------------------------------------------------------------------


def test_ways_that_do_not_exist_say_why(tmp_path, capsys):
    tree = lm_tree(tmp_path, optimizer={"kind": "adafactor"})
    path = write_recipe(tmp_path / "recipe.yaml", tree)
    assert main(["plan", str(path)]) == 0
    text = capsys.readouterr().out
    assert "streamed ssd: not for this recipe: optimizer.kind=adafactor keeps its state" in text
    assert "plain *" in text and "in_backward" in text


def test_the_recipe_itself_is_a_neighbour_unchanged(tmp_path):
    changes = {"update": {"kind": "streamed", "clip": "layer", "max_grad_norm": 1.0},
               "offload": {"kind": "ssd", "ram_budget": "1GiB", "states": "8bit"}}  # fmt: skip
    recipe = build_recipe(lm_tree(tmp_path, **changes))
    assert neighbour(recipe, "streamed ssd") is recipe
    host = neighbour(recipe, "streamed host")
    assert host.offload.states == "8bit" and host.offload.ram_budget == 1 << 30
    assert neighbour(recipe, "plain").offload.kind == "none"


def limited(monkeypatch, nbytes):
    small = Machine(nbytes, nbytes, "RAM")
    monkeypatch.setattr(fits, "this_machine", lambda _: small)


def test_what_cannot_fit_is_refused_before_anything_is_built(tmp_path, monkeypatch):
    tree = lm_tree(tmp_path, model={"hidden_size": 256, "layers": 8, "heads": 4})
    recipe = build_recipe(tree)
    exact = sum(least_bytes(recipe, TOKENIZER, CPU).values())
    streamed = neighbour(recipe, "streamed ssd")
    small = sum(least_bytes(streamed, TOKENIZER, CPU).values())
    assert 3 * small < exact
    limited(monkeypatch, exact)
    check_fits(recipe, TOKENIZER, CPU)
    limited(monkeypatch, exact - 1)
    with pytest.raises(UserError, match=r"weights .*optimizer state .*\(RAM\)") as caught:
        train_here(tree)
    assert "update=streamed offload=ssd" in str(caught.value)
    assert "update=plain" not in str(caught.value)
    check_fits(streamed, TOKENIZER, CPU)
    limited(monkeypatch, small - 1)
    with pytest.raises(UserError, match="take a smaller model"):
        check_fits(streamed, TOKENIZER, CPU)


def test_the_quick_look_never_hides_a_run_that_is_too_large(tmp_path):
    for size in (64, 256):
        for kind in ("adamw", "apollo"):
            tree = lm_tree(
                tmp_path, model={"hidden_size": size, "layers": 3}, optimizer={"kind": kind}
            )
            recipe = build_recipe(tree)
            most = fits._most_bytes(recipe)
            for name in fits.WAYS:
                parts = least_bytes(neighbour(recipe, name), TOKENIZER, CPU)
                assert sum(parts.values()) < most


def test_limits_of_the_machine(tmp_path, monkeypatch):
    ram, _ = memory_limit()
    (tmp_path / "memory.max").write_text("1048576\n")
    monkeypatch.setattr(machine, "_groups", lambda: [tmp_path])
    assert memory_limit() == (1 << 20, f"the control group {tmp_path}")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory_limit()[0] == ram


@pytest.mark.parametrize("text", ["many", "1", "64,,32"])
def test_lengths_that_are_none(text, tmp_path, capsys):
    path = write_recipe(tmp_path / "recipe.yaml", lm_tree(tmp_path))
    assert main(["plan", str(path), "--length", text]) == 2
    assert "--length" in capsys.readouterr().err
