"""A streamed run killed at any instant, inside commits too, comes back to the same bits.

Kills follow one another in one run folder: each start takes up what the last kill left.
"""

import random
import signal
import time

import pytest
from faults import POINTS, fault_server
from support import lm_tree, merge, rows_of, same_weights, weights_of, write_recipe

from mnemic.train.checkpoint import list_checkpoints
from mnemic.train.offload.store import read_manifest

OPTIMIZERS = ["adamw", "apollo_mini"]
STEPS = 16


@pytest.fixture(scope="module")
def server():
    return fault_server()


def recipe(folder, optimizer, name, **changes):
    tree = lm_tree(
        folder,
        run_dir=str(folder / name),
        model={"hidden_size": 32, "layers": 4},
        optimizer={"kind": optimizer},
        update={"kind": "streamed"},
        offload={"kind": "ssd"},
        loop={"steps": STEPS, "save_every": 3, "micro_batch_size": 4},
        evaluation={"holdout": 0.2, "every": 4, "max_rows": 8, "export_best": True},
    )
    return write_recipe(folder / f"{name}.yaml", merge(tree, changes))


@pytest.fixture(scope="module", params=OPTIMIZERS)
def whole(request, tmp_path_factory, server):
    """(optimizer, run folder, seconds) of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp(request.param)
    start = time.perf_counter()
    path = recipe(folder, request.param, "whole")
    status, output = server.run("train", path, cwd=folder)
    assert status == 0, output
    assert len(rows_of(folder / "whole")) == STEPS + 1
    return request.param, folder / "whole", time.perf_counter() - start


def committed(run):
    """Step of the last commit, -1 without one, and the checksums of all weights and states."""
    found = read_manifest(run / "offload")
    return (found["step"], found["crc32"]) if found else (-1, [])


def assert_same(run, expected):
    assert rows_of(run) == rows_of(expected)
    assert same_weights(weights_of(run / "final"), weights_of(expected / "final"))
    assert committed(run) == committed(expected)


def check_random_kills(tmp_path, server, whole, kills, **changes):
    optimizer, expected, seconds = whole
    rng = random.Random(2718)
    done, number, instants = 0, 0, []
    while done < kills:
        number += 1
        run = tmp_path / f"broken{number}"
        path = recipe(tmp_path, optimizer, run.name, **changes)
        step, status = -1, -signal.SIGKILL
        while status:
            # The last start of a chain is left alone.
            left = done < kills
            instants.append(rng.uniform(0.02, 0.6) * seconds if left else None)
            status, output = server.run("train", path, cwd=tmp_path, kill_after=instants[-1])
            assert status in (0, -signal.SIGKILL), output
            done += status != 0
            before, (step, _) = step, committed(run)
            assert step >= before, (instants, output)
        assert_same(run, expected)
    return done


@pytest.mark.timeout(600)
def test_kill_9_at_random_instants_changes_no_bit(tmp_path, server, whole):
    assert check_random_kills(tmp_path, server, whole, kills=6) == 6


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_kill_9_at_fifty_random_instants_changes_no_bit(tmp_path, server, whole):
    assert check_random_kills(tmp_path, server, whole, kills=50) == 50


# (point, call, commit and newest checkpoint afterwards) in the order of one run: a commit is made
# for the import (step 0) and for each step; a checkpoint at every third step before its commit, and
# at an evaluation (every fourth) that is the best one yet.
CHAIN = [
    ("folder noted", 1, -1, None),
    ("file reserved", 1, -1, None),
    ("piece written", 3, -1, None),
    ("before fdatasync", 1, -1, None),
    ("manifest renamed", 1, 0, None),
    ("piece written", 4, 0, None),
    ("before fdatasync", 1, 0, None),
    ("after fdatasync", 1, 0, None),
    ("manifest torn", 1, 0, None),
    ("manifest written", 1, 0, None),
    ("manifest renamed", 1, 1, None),
    ("write torn", 5, 1, None),
    ("row written", 1, 1, None),
    ("commit begun", 1, 1, None),
    ("commit ended", 1, 2, None),
    ("checkpoint torn", 2, 2, None),
    ("checkpoint written", 1, 2, None),
    ("checkpoint synced", 1, 2, None),
    ("checkpoint renamed", 1, 2, 3),
    # The checkpoint is later than the commit: it is taken up, and then committed.
    ("piece written", 3, 2, 3),
    ("manifest torn", 1, 2, 3),
    ("manifest renamed", 1, 3, 3),
    ("manifest renamed", 4, 7, 6),
    ("checkpoint saved", 1, 7, 8),
    ("checkpoint discarded", 1, 8, 9),
]


@pytest.mark.timeout(600)
def test_kill_9_inside_imports_commits_and_checkpoints_changes_no_bit(tmp_path, server, whole):
    optimizer, expected, _ = whole
    path, run = recipe(tmp_path, optimizer, "broken"), tmp_path / "broken"
    for point, count, step, newest in CHAIN:
        status, output = server.run(f"die={point}:{count}", "train", path, cwd=tmp_path)
        assert status == -signal.SIGKILL, (point, output)
        saved = list_checkpoints(run / "checkpoints")
        assert (committed(run)[0], saved[-1][0] if saved else None) == (step, newest), point
    for point in ("export torn", "export written"):
        status, output = server.run(f"die={point}:1", "train", path, cwd=tmp_path)
        assert status == -signal.SIGKILL and committed(run)[0] == STEPS, (point, output)
        assert not (run / "final").exists() and not (run / "summary.json").exists()
    status, output = server.run("train", path, cwd=tmp_path)
    assert status == 0 and f"(step {STEPS} of {STEPS})" in output, output
    assert_same(run, expected)
    assert {point for point, *_ in CHAIN} | {"export torn", "export written"} == POINTS.keys()


VARIANTS = {
    "speculative": {"update": {"kind": "streamed", "clip": "speculative", "max_grad_norm": 0.5}},
    "previous_norm": {
        "update": {"kind": "streamed", "clip": "previous_norm", "max_grad_norm": 0.5}
    },
    "exact_spill": {"update": {"kind": "streamed", "clip": "exact_spill", "max_grad_norm": 0.5}},
    "buffered 8bit": {"offload": {"kind": "ssd", "direct": False, "states": "8bit"}},
    "lora": {"adapters": {"kind": "lora", "r": 4}},
}


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", VARIANTS)
def test_kill_9_changes_no_bit_of_other_updates_and_states(tmp_path, server, name):
    start = time.perf_counter()
    path = recipe(tmp_path, "adamw", "whole", **VARIANTS[name])
    status, output = server.run("train", path, cwd=tmp_path)
    assert status == 0, output
    whole = ("adamw", tmp_path / "whole", time.perf_counter() - start)
    assert check_random_kills(tmp_path, server, whole, kills=20, **VARIANTS[name]) == 20
