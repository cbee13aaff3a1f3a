"""Exports: the mean of checkpoints."""

import torch
from safetensors.torch import load_file
from support import lm_tree, mnemic, train_here, weights_of

from mnemic.train.export import load_run


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


def test_a_run_keeps_the_vocabulary_it_learned_when_the_data_changes(tmp_path):
    """Ids learned from other rows would be another model's: seen as garbage, told by nothing."""
    model = {"kind": "tiny", "hidden_size": 32, "layers": 1, "heads": 2, "vocab_size": 300}
    train_here(lm_tree(tmp_path, model=model))
    first, before, _ = load_run(str(tmp_path / "run"))
    (tmp_path / "text.txt").write_text("Quite another text, of other words and letters.\n" * 200)
    again, after, _ = load_run(str(tmp_path / "run"))
    assert before.get_vocab() == after.get_vocab()
    assert len(before.get_vocab()) == 300 == first.config.vocab_size
    text = "Line 7: the quick fox"
    assert before(text).input_ids == after(text).input_ids and len(before(text).input_ids) < 15
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
