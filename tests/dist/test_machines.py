"""Two machines: two torchrun agents that meet at an address, each with a process of its own."""

import socket
import subprocess

import pytest
from ranks import close, command, ended, environment, train
from support import lm_tree, train_here, write_recipe

pytestmark = pytest.mark.dist


def machines(folders, engine="ddp", *overrides):
    """(status, output) of an agent in each folder, one process each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agents = []
    for number, folder in enumerate(folders):
        place = (
            f"--nnodes={len(folders)}", f"--node_rank={number}", "--master_addr=127.0.0.1",
            f"--master_port={port}",
        )  # fmt: skip
        one = command(2, *overrides, agent=place)
        one[one.index("--nproc_per_node=2")] = "--nproc_per_node=1"
        agents.append(
            subprocess.Popen(
                one, cwd=folder, env=environment(engine), text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
        )  # fmt: skip
    with ended(*agents):
        outputs = [agent.communicate(timeout=250)[0] for agent in agents]
    return [(agent.returncode, out) for agent, out in zip(agents, outputs, strict=True)]


def recipe_in(folder, optimizer="adamw"):
    folder.mkdir()
    tree = lm_tree(
        folder, optimizer={"kind": optimizer, "lr": 3e-3}, loop={"schedule": "constant"},
        evaluation={"every": 5, "holdout": 0.2},
    )  # fmt: skip
    write_recipe(folder / "recipe.yaml", tree)
    return tree


def test_a_run_folder_that_one_machine_has_is_refused(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        recipe_in(folder)
    # A relative folder: each machine has one of its own.
    found = machines(folders, "ddp", "run_dir=run")
    for status, output in found:
        assert status != 0
        assert "run_dir: run is another folder, or none, on rank 1 (" in output
    assert not list((folders[0] / "run").glob(".shared-*"))
    assert not (folders[0] / "run" / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_machines_are_one(tmp_path, engine):
    """Stopped on two machines, gone on with on one, with as many ranks and with one."""
    one, two = tmp_path / "one", tmp_path / "two"
    train_here(recipe_in(one, "apollo"))
    recipe_in(two, "apollo")
    for status, output in machines([two, two], engine, "loop.steps=5"):
        assert status == 0, output[-3000:]
    train(two, 2, engine=engine)
    close(two, one)
