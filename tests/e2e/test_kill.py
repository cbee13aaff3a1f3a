"""A run killed at any instant comes back to the same bits."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from support import lm_tree, rows_of, same_weights, sft_tree, weights_of, write_recipe

KILLS = 20


def recipe(folder, make, name):
    tree = make(
        folder,
        run_dir=str(folder / name),
        adapters={"kind": "lora", "r": 4, "dropout": 0.1} if make is sft_tree else "none",
        loop={"steps": 40, "save_every": 3, "batch_size": 8, "micro_batch_size": 4},
        evaluation={"holdout": 0.2, "every": 10, "max_rows": 8},
    )
    return write_recipe(folder / f"{name}.yaml", tree)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("make", [lm_tree, sft_tree])
def test_kill_9_at_random_instants_changes_no_bit(tmp_path, fork_server, make):
    whole = recipe(tmp_path, make, "whole")
    start = time.perf_counter()
    status, output = fork_server.run("train", whole, cwd=tmp_path)
    assert status == 0, output
    duration = time.perf_counter() - start
    expected_rows, expected = rows_of(tmp_path / "whole"), weights_of(tmp_path / "whole" / "final")
    assert len(expected_rows) == 41

    rng = random.Random(2718)
    kills, finished, instants = 0, 0, []
    for attempt in range(KILLS // 2):
        broken = recipe(tmp_path, make, f"broken{attempt}")
        # Two kills in the same run, the second while or after it resumes.
        for _ in range(2):
            instant = rng.uniform(0.05, 1.0) * duration
            status, output = fork_server.run("train", broken, cwd=tmp_path, kill_after=instant)
            kills += status == -signal.SIGKILL
            finished += status == 0
            instants.append(instant)
            assert status in (0, -signal.SIGKILL), output
        status, output = fork_server.run("train", broken, cwd=tmp_path)
        assert status == 0, output
        assert rows_of(tmp_path / f"broken{attempt}") == expected_rows, instants
        assert same_weights(weights_of(tmp_path / f"broken{attempt}" / "final"), expected), instants
    # An instant near the end can come late; most must have hit a live process.
    assert kills >= KILLS * 0.6 and kills + finished == KILLS


def test_kill_9_of_an_ordinary_process(tmp_path):
    """The same once with the plain command, killed as soon as its second checkpoint is there."""
    paths = {name: recipe(tmp_path, lm_tree, name) for name in ("whole", "broken")}
    command = [sys.executable, "-m", "mnemic.train.cli", "train"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, paths["whole"]], check=True, env=env, capture_output=True)
    with subprocess.Popen([*command, paths["broken"]], env=env, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "broken" / "checkpoints" / "step-00000006").exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.001)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    subprocess.run([*command, paths["broken"]], check=True, env=env, capture_output=True)
    assert rows_of(tmp_path / "broken") == rows_of(tmp_path / "whole")
    assert same_weights(
        weights_of(tmp_path / "broken" / "final"), weights_of(tmp_path / "whole" / "final")
    )
