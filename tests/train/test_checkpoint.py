"""Checkpoints: atomic, checked, kept in the right number, and never another run's."""

import json
import os
import random

import pytest
from support import lm_tree, rows_of, train_here

from mnemic.train.checkpoint import (
    CheckpointWriter,
    list_checkpoints,
    prune,
    verify,
    write_atomic,
)
from mnemic.train.errors import UserError


def make(folder, *steps):
    for step in steps:
        with CheckpointWriter(folder, step) as temp:
            (temp / "a.bin").write_bytes(os.urandom(1000))
            (temp / "sub").mkdir()
            (temp / "sub" / "b.bin").write_bytes(b"x")
    return folder


def test_a_checkpoint_appears_whole_or_not_at_all(tmp_path):
    folder = make(tmp_path / "c", 5)
    ((step, path),) = list_checkpoints(folder)
    assert step == 5 and verify(path)["step"] == 5
    words = r"step 6 could not be written.*boom.*step-00000005"
    with pytest.raises(UserError, match=words), CheckpointWriter(folder, 6) as temp:
        (temp / "a.bin").write_bytes(b"half")
        raise RuntimeError("boom")
    assert [p.name for p in folder.iterdir()] == ["step-00000005"]


def test_an_interrupted_save_is_swept_and_never_listed(tmp_path):
    folder = make(tmp_path / "c", 5)
    with pytest.raises(KeyboardInterrupt), CheckpointWriter(folder, 6) as temp:
        (temp / "a.bin").write_bytes(b"half")
        raise KeyboardInterrupt
    assert (folder / ".tmp-step-00000006").exists()
    assert [s for s, _ in list_checkpoints(folder)] == [5]
    make(folder, 7)
    assert not list(folder.glob(".tmp*"))


@pytest.mark.parametrize("name", ["a.bin", "sub/b.bin", "manifest.json"])
def test_any_flipped_byte_is_found(tmp_path, name):
    folder = make(tmp_path / "c", 3, 5)
    path = folder / "step-00000005"
    raw = bytearray((path / name).read_bytes())
    index = random.Random(0).randrange(len(raw)) if name == "a.bin" else 0
    raw[index] ^= 1
    (path / name).write_bytes(raw)
    with pytest.raises(UserError, match=r"damaged.*loop.resume=.*step-00000003"):
        verify(path)


def test_missing_and_cut_files_are_found(tmp_path):
    path = make(tmp_path / "c", 5) / "step-00000005"
    (path / "a.bin").write_bytes((path / "a.bin").read_bytes()[:-1])
    with pytest.raises(UserError, match="damaged"):
        verify(path)
    (path / "a.bin").unlink()
    with pytest.raises(UserError, match="missing"):
        verify(path)
    (path / "manifest.json").unlink()
    with pytest.raises(UserError, match="not a checkpoint"):
        verify(path)


def test_a_newer_format_is_refused(tmp_path):
    path = make(tmp_path / "c", 5) / "step-00000005"
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(UserError, match="format 99"):
        verify(path)


def test_pruning_keeps_the_newest_and_the_protected(tmp_path):
    folder = make(tmp_path / "c", 1, 2, 3, 4, 5)
    prune(folder, 2, {2})
    assert [s for s, _ in list_checkpoints(folder)] == [2, 4, 5]


def test_too_little_space_is_said_before_writing(tmp_path):
    folder = make(tmp_path / "c", 1)
    words = r"No space left.*intact on disk: step-00000001"
    writer = CheckpointWriter(folder, 2, needed_bytes=1 << 60)
    with pytest.raises(UserError, match=words), writer:
        pytest.fail("the block must not run")


def test_write_atomic_replaces(tmp_path):
    write_atomic(tmp_path / "f", b"one")
    write_atomic(tmp_path / "f", b"two")
    assert (tmp_path / "f").read_bytes() == b"two" and len(list(tmp_path.iterdir())) == 1


def test_checkpoints_hold_no_code(tmp_path):
    """`trainer.pt` loads with weights_only; a pickle that calls a function does not."""
    import torch

    train_here(lm_tree(tmp_path))
    path = tmp_path / "run" / "checkpoints" / "step-00000008" / "trainer.pt"
    state = torch.load(path, weights_only=True)
    assert state["step"] == 8 and state["optimizer"]["state"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"optimizer": {"lr": 1.0}}, r"optimizer.lr 0.003 -> 1.0"),
        ({"loop": {"batch_size": 4}}, "loop.batch_size"),
        ({"loop": {"resume": "never"}}, "already holds a run and loop.resume=never"),
        ({"loop": {"resume": "nowhere"}}, "already holds a run"),
        ({"evaluation": {"holdout": 0.5}}, "evaluation.holdout"),
    ],
)
def test_another_run_is_never_clobbered(tmp_path, change, words):
    train_here(lm_tree(tmp_path))
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(UserError, match=words):
        train_here(lm_tree(tmp_path, **change))
    after = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert {p: b for p, b in before.items() if p.name != ".lock"} == {
        p: b for p, b in after.items() if p.name != ".lock"
    }


def test_more_steps_and_other_micro_batches_go_on_in_the_same_run(tmp_path):
    train_here(lm_tree(tmp_path, loop={"schedule": "constant"}))
    changes = {"loop": {"schedule": "constant", "steps": 12, "micro_batch_size": 2}}
    assert train_here(lm_tree(tmp_path, **changes))["steps"] == 12
    assert [row["step"] for row in rows_of(tmp_path / "run")] == list(range(1, 13))


def test_a_new_run_can_begin_from_a_checkpoint_of_another(tmp_path):
    train_here(lm_tree(tmp_path))
    source = tmp_path / "run" / "checkpoints" / "step-00000006"
    tree = lm_tree(tmp_path, run_dir=str(tmp_path / "other"), loop={"resume": str(source)})
    train_here(tree)
    assert rows_of(tmp_path / "other")[-1] == rows_of(tmp_path / "run")[-1]


def test_two_processes_cannot_share_a_run_folder(tmp_path):
    from mnemic.train.folder import RunFolder
    from mnemic.train.recipe.load import build_recipe

    folder = RunFolder(tmp_path / "run")
    folder.claim(build_recipe(lm_tree(tmp_path)))
    with pytest.raises(UserError, match=f"in use by another mnemic process .pid {os.getpid()}"):
        RunFolder(tmp_path / "run").claim(build_recipe(lm_tree(tmp_path)))
    folder.release()
    RunFolder(tmp_path / "run").claim(build_recipe(lm_tree(tmp_path)))
