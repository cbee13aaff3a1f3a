"""Whole runs on several CPU ranks: `mnemic train` by torchrun and gloo, with what `accelerate
launch` would announce in the environment.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from support import rows_of, weights_of

ENGINES: dict[str, dict[str, str]] = {
    "ddp": {},
    # What accelerate sets of recipes/accelerate/fsdp2.yaml (accelerate/utils/launch.py).
    "fsdp2": {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
        "FSDP_OFFLOAD_PARAMS": "false",
    },
}


def command(ranks: int, *overrides: str, agent: tuple[str, ...] = ("--standalone",)) -> list[str]:
    """One process, or torchrun with `agent`'s arguments and `ranks` processes."""
    run = [sys.executable, "-m"]
    if ranks > 1:
        run += ["torch.distributed.run", *agent, f"--nproc_per_node={ranks}", "-m"]
    return [*run, "mnemic.train.cli", "train", "recipe.yaml", *overrides]


def environment(engine: str) -> dict[str, str]:
    return {**os.environ, **ENGINES[engine], "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def run(folder: Path, ranks: int, *overrides: str, engine: str = "ddp") -> Any:
    """The finished process of the run that `folder/recipe.yaml` describes."""
    process = subprocess.Popen(
        command(ranks, *overrides), cwd=folder, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=environment(engine),
    )  # fmt: skip
    with ended(process):
        out, err = process.communicate(timeout=250)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@contextmanager
def ended(*agents: subprocess.Popen[str]) -> Iterator[None]:
    """On the way out, launchers that still run are asked to end, and end their ranks."""
    try:
        yield
    finally:
        for agent in agents:
            if agent.poll() is None:
                agent.terminate()
        for agent in agents:
            agent.wait(timeout=60)


def train(folder: Path, ranks: int, *overrides: str, engine: str = "ddp") -> None:
    done = run(folder, ranks, *overrides, engine=engine)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]


def close(folder: Path, other: Path) -> None:
    """Rows of metrics.jsonl within 1e-5, weights within what that makes of them."""
    import torch

    for row, expected in zip(rows_of(folder / "run"), rows_of(other / "run"), strict=True):
        assert row.keys() == expected.keys()
        for key, value in expected.items():
            assert row[key] == pytest.approx(value, rel=1e-5), (key, row["step"])
    weights = weights_of(other / "run" / "final")
    found = weights_of(folder / "run" / "final")
    assert found.keys() == weights.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, weights[name], rtol=1e-3, atol=1e-4)
