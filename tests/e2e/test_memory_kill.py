"""Memory training killed at any instant, in rollouts or updates, comes back to the same bits."""

import random
import signal
import time

import pytest
from memory_support import grpo_tree
from support import rows_of, same_weights, weights_of, write_recipe


def recipe(folder, model, name):
    tree = grpo_tree(
        folder, model,
        run_dir=str(folder / name),
        # Two steps for each batch of rollouts: a checkpoint between them holds the rows.
        objective={"reuse": 2, "beta": 0.01},
        loop={"steps": 24, "save_every": 2},
        data={"kind": "kvstream", "stages": [{"n_chunks": 2, "n_entities": 2}], "mastery": 0.1},
        evaluation={"data": {"kind": "kvstream", "split": "heldout", "size": 4}, "every": 12,
                    "metric": "eval/r1"},
    )  # fmt: skip
    return write_recipe(folder / f"{name}.yaml", tree)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_during_rollouts_and_updates_changes_no_bit(
    tmp_path, fork_server, warm_model, kills
):
    whole = recipe(tmp_path, warm_model, "whole")
    start = time.perf_counter()
    status, output = fork_server.run("train", whole, cwd=tmp_path)
    assert status == 0, output
    duration = time.perf_counter() - start
    rows, weights = rows_of(tmp_path / "whole"), weights_of(tmp_path / "whole" / "final")
    assert len(rows) == 25 and {row.get("rollout/stage") for row in rows} >= {0.0, 1.0}
    draw = random.Random(31)
    hit = 0
    for attempt in range(kills // 2):
        broken = recipe(tmp_path, warm_model, f"broken{attempt}")
        for _ in range(2):
            instant = draw.uniform(0.2, 1.0) * duration
            status, output = fork_server.run("train", broken, cwd=tmp_path, kill_after=instant)
            hit += status == -signal.SIGKILL
            assert status in (0, -signal.SIGKILL), output
        status, output = fork_server.run("train", broken, cwd=tmp_path)
        assert status == 0, output
        assert rows_of(tmp_path / f"broken{attempt}") == rows
        assert same_weights(weights_of(tmp_path / f"broken{attempt}" / "final"), weights)
    assert hit >= kills * 0.5
