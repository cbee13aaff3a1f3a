"""Exports: the mean of checkpoints."""

import torch
from safetensors.torch import load_file
from support import lm_tree, mnemic, train_here, weights_of


def test_the_mean_of_the_newest_checkpoints(tmp_path):
    tree = lm_tree(tmp_path, loop={"steps": 6, "save_every": 2, "keep_checkpoints": 3})
    train_here(tree)
    done = mnemic("export", "run", "mean", "--average", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    steps = [
        load_file(tmp_path / "run" / "checkpoints" / f"step-0000000{n}" / "model.safetensors")
        for n in (4, 6)
    ]
    found = weights_of(tmp_path / "mean")
    moved = False
    for name, weight in found.items():
        torch.testing.assert_close(weight, (steps[0][name] + steps[1][name]) / 2)
        moved |= not torch.equal(weight, steps[1][name])
    assert moved
    few = mnemic("export", "run", "none", "--average", 4, cwd=tmp_path)
    assert few.returncode == 1 and "holds 3 checkpoints" in few.stderr
    assert not (tmp_path / "none").exists()
