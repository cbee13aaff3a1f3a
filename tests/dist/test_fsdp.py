"""APOLLO under FSDP2 is APOLLO: raw `fully_shard` on gloo, 2 and 4 ranks against one process."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).parent / "fsdp_worker.py"

pytestmark = pytest.mark.dist


def torchrun(ranks: int, *args) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         f"--nproc_per_node={ranks}", *map(str, args)],
        capture_output=True, text=True, timeout=200, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def worker():
    spec = importlib.util.spec_from_file_location("fsdp_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What 2 ranks and then 4 found; the 4 go on from the checkpoint of the 2."""
    folder = tmp_path_factory.mktemp("fsdp")
    found = {}
    for ranks in (2, 4):
        torchrun(ranks, WORKER, folder / f"{ranks}.pt", folder / "checkpoint")
        found[ranks] = torch.load(folder / f"{ranks}.pt", weights_only=True)
    return found


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", ["sparse", "gaussian", "mini"])
def test_ranks_give_the_weights_of_one_process(runs, worker, kind, ranks):
    model, optimizer = worker.build(kind, sharded=False)
    worker.train(model, optimizer, range(worker.STEPS))
    whole = sum(t.numel() for s in optimizer.state.values() for t in s.values())
    found = runs[ranks][kind]
    assert found["weights"].keys() == dict(model.named_parameters()).keys()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(
            found["weights"][name], weight.detach(), rtol=1e-9, atol=1e-12, msg=name
        )
    assert found["held"] < 0.75 * whole, "the state is not sharded"


def test_a_checkpoint_of_two_ranks_goes_on_with_four(runs):
    expected = runs[2]["sparse"]["weights"]
    for name, weight in runs[4]["resumed"]["weights"].items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-9, atol=1e-12, msg=name)
