"""Damage, full disks and vanished folders of a streamed run: one sentence, and its advice works."""

import os
import re
import shutil
import signal
import subprocess

import pytest
from faults import fault_server
from offload_support import mounting
from support import lm_tree, merge, rows_of, same_weights, weights_of, write_recipe

from mnemic.train.offload.store import read_manifest
from mnemic.train.offload.work import WorkFolders


@pytest.fixture(scope="module")
def server():
    return fault_server()


def tree_of(folder, name="run", **changes):
    """Six steps, a checkpoint at the fourth."""
    tree = lm_tree(
        folder,
        run_dir=str(folder / name),
        model={"hidden_size": 32, "layers": 2},
        update="streamed",
        offload={"kind": "ssd"},
        loop={"steps": 6, "save_every": 4, "schedule": "constant"},
    )
    return merge(tree, changes)


def recipe(folder, name="run", **changes):
    return write_recipe(folder / f"{name}.yaml", tree_of(folder, name, **changes))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, server):
    """Run folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    status, output = server.run("train", recipe(folder), cwd=folder)
    assert status == 0, output
    return folder / "run"


def assert_same(run, whole):
    assert rows_of(run) == rows_of(whole)
    assert same_weights(weights_of(run / "final"), weights_of(whole / "final"))


def sentence(status, output, *words):
    """The one sentence of a run that ended with status 1."""
    found = [line for line in output.splitlines() if line.startswith("mnemic: ")]
    assert status == 1 and len(found) == 1 and "Traceback" not in output, output
    for word in words:
        assert word in found[0], f"{word!r} is not in {found[0]!r}"
    return found[0]


def follow(advice):
    """Delete what the sentence says to delete."""
    named = re.search(r"delete (\S+(?: and \S+)*) to (?:go on|begin)", advice)
    assert named, advice
    for path in named[1].split(" and "):
        shutil.rmtree(path)


def snapshot(folder):
    return {
        path: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("lock", ".lock")
    }


def flip(path, at):
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def striped(folder):
    """Two folders for `offload.path`."""
    paths = [folder / "disk-one", folder / "disk-two"]
    for path in paths:
        path.mkdir()
    return paths


# Damage ----------------------------------------------------------------------------------------


# The sixth step is in the first of the two extents, and block 0 is the first piece.
DAMAGES = {
    "a bit of the weights": (
        lambda work: flip(work / "data.bin", 100),
        ["block/0 is damaged (", "data.bin, ", "not that of the commit of step 6"],
    ),
    "a bit of the manifest": (lambda work: flip(work / "commit", 300), ["commit: damaged"]),
    "a cut manifest": (lambda work: os.truncate(work / "commit", 40), ["commit: damaged"]),
    "a cut file": (
        lambda work: os.truncate(work / "data.bin", 8192),
        ["data.bin has 8,192 bytes where ", "so it was cut"],
    ),
    "a missing file": (
        lambda work: (work / "data.bin").unlink(),
        ["data.bin is missing", "bring it back"],
    ),
}


def copied(folder, whole):
    """(recipe, run folder): a copy of the finished run, to be gone on with."""
    shutil.copytree(whole, folder / "run")
    return recipe(folder, data={"path": str(whole.parent / "text.txt")}), folder / "run"


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named_at_resume_and_the_advice_works(tmp_path, server, whole, name):
    damage, words = DAMAGES[name]
    path, run = copied(tmp_path, whole)
    assert server.run("train", path, cwd=tmp_path)[0] == 0
    damage(run / "offload")
    before = snapshot(run)
    for _ in range(2):
        advice = sentence(*server.run("train", path, cwd=tmp_path), *words)
        assert snapshot(run) == before
    follow(advice)
    status, output = server.run("train", path, cwd=tmp_path)
    assert status == 0 and "(step 4 of 6)" in output, output
    assert_same(run, whole)
    assert read_manifest(run / "offload")["step"] == 6


@pytest.mark.parametrize("name", ["a bit of the weights", "a bit of the manifest"])
def test_a_checkpoint_that_the_recipe_names_needs_no_commit(tmp_path, server, whole, name):
    damage, words = DAMAGES[name]
    path, run = copied(tmp_path, whole)
    damage(run / "offload")
    sentence(*server.run("train", path, cwd=tmp_path), *words)
    named = f"loop.resume={run / 'checkpoints' / 'step-00000004'}"
    status, output = server.run("train", path, named, cwd=tmp_path)
    assert status == 0 and "(step 4 of 6)" in output, output
    assert_same(run, whole)
    assert server.run("train", path, cwd=tmp_path)[0] == 0


def test_a_run_begun_from_another_ones_checkpoint_keeps_its_own_commits(tmp_path, server, whole):
    changes = {"data": {"path": str(whole.parent / "text.txt")}}
    path, run = recipe(tmp_path, **changes), tmp_path / "run"
    other = f"loop.resume={whole / 'checkpoints' / 'step-00000004'}"
    status, output = server.run("die=piece written:5", "train", path, other, cwd=tmp_path)
    assert status == -signal.SIGKILL and read_manifest(run / "offload") is None, output
    status, output = server.run("die=manifest renamed:2", "train", path, other, cwd=tmp_path)
    assert status == -signal.SIGKILL and read_manifest(run / "offload")["step"] == 5, output
    words = ["holds a commit of step 5", "set loop.resume=auto to go on"]
    sentence(*server.run("train", path, other, cwd=tmp_path), *words)
    status, output = server.run("train", path, cwd=tmp_path)
    assert status == 0 and "(step 5 of 6)" in output, output
    assert rows_of(run) == rows_of(whole)[4:]
    assert same_weights(weights_of(run / "final"), weights_of(whole / "final"))


def test_a_damaged_frozen_base_is_written_again(tmp_path, server):
    """Adapters are in the checkpoints; the base comes from where it came from."""
    path, run = recipe(tmp_path, adapters={"kind": "lora", "r": 4}), tmp_path / "run"
    # Killed while it writes the base, and once when that is done.
    for point, commit in (("write torn:2", None), ("commit ended:1", 0)):
        status, output = server.run(f"die={point}", "train", path, cwd=tmp_path)
        assert status == -signal.SIGKILL, output
        found = read_manifest(run / "offload")
        assert (found["step"] if found else None) == commit
    assert server.run("train", path, cwd=tmp_path)[0] == 0
    expected, weights = rows_of(run), weights_of(run / "final")
    (run / "checkpoints" / "step-00000006").rename(tmp_path / "aside")
    flip(run / "offload" / "data.bin", 100)
    follow(sentence(*server.run("train", path, cwd=tmp_path), "block/0 is damaged"))
    status, output = server.run("train", path, cwd=tmp_path)
    assert status == 0 and "step 4 of 6" in output, output
    assert rows_of(run) == expected and same_weights(weights_of(run / "final"), weights)


def test_a_damaged_checkpoint_stops_only_the_run_that_needs_it(tmp_path, server):
    path, run = recipe(tmp_path, loop={"save_every": 2}), tmp_path / "run"
    assert server.run("train", path, cwd=tmp_path)[0] == 0
    expected, weights = rows_of(run), weights_of(run / "final")
    copy = run / "checkpoints" / "step-00000006" / "offload.bin"
    flip(copy, 100)
    # The commit is later or as late: nobody reads the checkpoint.
    shutil.rmtree(run / "final")
    status, output = server.run("train", path, cwd=tmp_path)
    assert status == 0 and "(step 6 of 6)" in output, output
    shutil.rmtree(run / "offload")
    older = run / "checkpoints" / "step-00000004"
    words = ["step-00000006/offload.bin: damaged, its checksum", f"loop.resume={older}"]
    sentence(*server.run("train", path, cwd=tmp_path), *words)
    status, output = server.run("train", path, f"loop.resume={older}", cwd=tmp_path)
    assert status == 0 and "(step 4 of 6)" in output, output
    assert rows_of(run) == expected and same_weights(weights_of(run / "final"), weights)


# Full disks and folders that cannot be -----------------------------------------------------------


@pytest.fixture
def mounted(tmp_path):
    with mounting(tmp_path) as mount:
        yield mount


def fill(disk):
    """All of the room that is left."""
    free = os.statvfs(disk)
    (disk / "ballast").write_bytes(bytes(free.f_bavail * free.f_frsize))


def test_a_disk_too_small_for_the_model(tmp_path, server, whole, mounted):
    disk = mounted("disk", "size=512k")
    path = recipe(tmp_path, offload={"path": str(disk)})
    words = [f"{disk}/mnemic-run-", "bytes free and the model with its optimizer state takes"]
    for _ in range(2):
        sentence(*server.run("train", path, cwd=tmp_path), *words, "make room, set offload.path")
        (work,) = disk.iterdir()
        assert {p.name for p in work.iterdir()} <= {"lock", "owner"}
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    assert server.run("train", path, cwd=tmp_path)[0] == 0
    assert_same(tmp_path / "run", whole)


def test_a_disk_that_fills_up_loses_no_committed_step(tmp_path, server, whole, mounted):
    disk = mounted("disk", "size=64m")
    path = recipe(tmp_path, offload={"path": str(disk)})
    assert server.run("train", path, "loop.steps=3", cwd=tmp_path)[0] == 0
    fill(disk)
    words = ["step 4 could not be committed", "No space left on device", "what was committed"]
    sentence(*server.run("train", path, cwd=tmp_path), *words)
    # Even the checkpoint that was made of the step is of use, and the commit before it is whole.
    (work,) = disk.glob("mnemic-run-*")
    assert read_manifest(work)["step"] == 3
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (disk / "ballast").unlink()
    status, output = server.run("train", path, cwd=tmp_path)
    assert status == 0 and "(step 3 of 6)" in output, output
    assert_same(tmp_path / "run", whole)
    assert not (work / ".commit.tmp").exists()


def test_no_room_for_a_checkpoint_loses_no_committed_step(tmp_path, server, whole, mounted):
    disk = mounted("small", "size=256k")
    place = mounted("disk", "size=64m")
    changes = {"run_dir": str(disk / "run"), "offload": {"path": str(place)}}
    path = recipe(tmp_path, **changes)
    words = ["the checkpoint of step 4 could not be written", "No space left", "make room"]
    sentence(*server.run("train", path, cwd=tmp_path), *words)
    assert list((disk / "run" / "checkpoints").iterdir()) == []
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    status, output = server.run("train", path, cwd=tmp_path)
    assert status == 0 and "(step 3 of 6)" in output, output
    assert_same(disk / "run", whole)


def test_a_read_only_folder(tmp_path, server, mounted):
    locked = mounted("locked", "size=1m,ro")
    path = recipe(tmp_path, offload={"path": str(locked)})
    words = ["locked/mnemic-run-", "cannot be written: Read-only file system", "set offload.path"]
    sentence(*server.run("train", path, cwd=tmp_path), *words)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("nowhere", "offload.path: nowhere is not a folder; give an existing one"),
        ("text.txt", "offload.path: text.txt is not a folder"),
        ([".", "nowhere"], "offload.path: nowhere is not a folder"),
        (["disk", "./disk"], "offload.path: disk is given twice"),
    ],
)
def test_paths_that_cannot_be(tmp_path, server, given, words):
    (tmp_path / "disk").mkdir()
    path = recipe(tmp_path, offload={"path": given})
    before = (tmp_path / "text.txt").read_bytes()
    sentence(*server.run("train", path, cwd=tmp_path), words)
    assert (tmp_path / "text.txt").read_bytes() == before
    assert list((tmp_path / "disk").iterdir()) == []


def test_a_relative_path_is_from_where_the_command_was_given(tmp_path, server, whole):
    (tmp_path / "disk").mkdir()
    (tmp_path / "elsewhere").mkdir()
    path = recipe(tmp_path, offload={"path": "disk"})
    assert server.run("train", path, "loop.steps=3", cwd=tmp_path)[0] == 0
    sentence(*server.run("train", path, cwd=tmp_path / "elsewhere"), "disk is not a folder")
    status, output = server.run("train", path, cwd=tmp_path)
    assert status == 0 and "(step 3 of 6)" in output, output
    assert_same(tmp_path / "run", whole)


def test_a_second_process_is_told_of_the_first(tmp_path, server, whole):
    disk = tmp_path / "disk"
    disk.mkdir()
    path, run = recipe(tmp_path, offload={"path": str(disk)}), tmp_path / "run"
    run.mkdir()
    first = WorkFolders(run, [str(disk)])
    first.claim()
    words = [f"{first.paths[0]} is in use by another mnemic process (pid {os.getpid()})"]
    sentence(*server.run("train", path, cwd=tmp_path), *words)
    first.release()
    assert server.run("train", path, cwd=tmp_path)[0] == 0
    assert_same(run, whole)


# Vanished folders ------------------------------------------------------------------------------


def test_a_vanished_folder_is_made_again_from_the_newest_checkpoint(tmp_path, server, whole):
    path, run = copied(tmp_path, whole)
    shutil.rmtree(run / "offload")
    status, output = server.run("train", path, cwd=tmp_path)
    assert status == 0 and "(step 4 of 6)" in output, output
    assert_same(run, whole)


def test_a_vanished_folder_without_a_checkpoint_does_not_silently_begin_again(
    tmp_path, server, whole
):
    """The disk may only not be mounted; a fresh start would cut the rows away."""
    disk = tmp_path / "disk"
    disk.mkdir()
    path, run = recipe(tmp_path, offload={"path": str(disk)}), tmp_path / "run"
    assert server.run("train", path, "loop.steps=3", cwd=tmp_path)[0] == 0
    disk.rename(tmp_path / "unmounted")
    disk.mkdir()
    rows = rows_of(run)
    assert len(rows) == 3
    for _ in range(2):
        advice = sentence(
            *server.run("train", path, cwd=tmp_path), f"{disk}/mnemic-run-", "no commit", "mounted"
        )
        assert rows_of(run) == rows
    # Mounted again, it goes on.
    shutil.rmtree(disk)
    (tmp_path / "unmounted").rename(disk)
    status, output = server.run("train", path, cwd=tmp_path)
    assert status == 0 and "(step 3 of 6)" in output, output
    assert_same(run, whole)
    # The other advice works as well.
    shutil.rmtree(disk)
    disk.mkdir()
    shutil.rmtree(run / "checkpoints")
    sentence(*server.run("train", path, cwd=tmp_path), "no commit")
    follow(advice)
    assert server.run("train", path, cwd=tmp_path)[0] == 0
    assert_same(run, whole)


@pytest.mark.parametrize("what", ["run/offload", "run"])
@pytest.mark.parametrize("point", ["row written:3", "commit begun:6", "checkpoint torn:2"])
def test_a_folder_that_vanishes_under_the_run(tmp_path, server, whole, what, point):
    path, run = recipe(tmp_path), tmp_path / "run"
    status, output = server.run(f"gone={point}:{tmp_path / what}", "train", path, cwd=tmp_path)
    if (what, point) == ("run", "checkpoint torn:2"):
        words = ["the checkpoint of step 4 could not be written"]
    else:
        words = [f"{run}/offload/data.bin was deleted under the run"]
    sentence(status, output, *words)
    if (what, point) == ("run/offload", "row written:3"):
        # Rows and no checkpoint: the user says that the run begins again.
        follow(sentence(*server.run("train", path, cwd=tmp_path), "no commit, but", "has rows"))
    status, output = server.run("train", path, cwd=tmp_path)
    assert status == 0, output
    assert ("(step 4 of 6)" in output) == ("/" in what and "row" not in point)
    assert_same(run, whole)


def test_a_disk_of_several_that_is_gone(tmp_path, server, whole):
    disks = striped(tmp_path)
    path = recipe(tmp_path, offload={"path": [str(disk) for disk in disks]})
    assert server.run("train", path, "loop.steps=5", cwd=tmp_path)[0] == 0
    works = [next(disk.glob("mnemic-run-*")) for disk in disks]
    assert all((work / "data.bin").stat().st_size for work in works)
    hidden = works[1].rename(tmp_path / "hidden")
    advice = sentence(*server.run("train", path, cwd=tmp_path), f"{works[1]}/data.bin is missing")
    shutil.rmtree(works[1])
    hidden.rename(works[1])
    status, output = server.run("train", path, "loop.steps=5", cwd=tmp_path)
    assert status == 0 and "(step 5 of 5)" in output, output
    disks[1].rename(tmp_path / "hidden")
    sentence(*server.run("train", path, cwd=tmp_path), f"{disks[1]} is not a folder")
    works[1].mkdir(parents=True)
    follow(advice)
    status, output = server.run("train", path, cwd=tmp_path)
    assert status == 0 and "(step 4 of 6)" in output, output
    assert_same(tmp_path / "run", whole)


# Leftovers -------------------------------------------------------------------------------------


def test_what_a_dead_run_leaves_is_removed_and_foreign_files_are_not(tmp_path, server):
    disk = tmp_path / "disk"
    disk.mkdir()
    foreign = [disk / name for name in ("commit", "data.bin", "gradients.bin", "photo.png")]
    for file in foreign:
        file.write_text("mine")
    update = {"kind": "streamed", "clip": "exact_spill", "max_grad_norm": 0.5}
    path = recipe(tmp_path, update=update, offload={"path": str(disk)})
    status, output = server.run("die=manifest torn:3", "train", path, cwd=tmp_path)
    assert status == -signal.SIGKILL, output
    (work,) = disk.glob("mnemic-run-*")
    (work / "activations.bin").write_bytes(b"left")
    left = {
        "commit",
        "data.bin",
        "gradients.bin",
        "activations.bin",
        ".commit.tmp",
        "lock",
        "owner",
    }
    assert {file.name for file in work.iterdir()} == left
    status, output = server.run("train", path, cwd=tmp_path)
    assert status == 0 and "(step 1 of 6)" in output, output
    assert {file.name for file in work.iterdir()} == {"commit", "data.bin", "lock", "owner"}
    assert all(file.read_text() == "mine" for file in foreign)
    assert set(disk.iterdir()) == {work, *foreign}
    whole = recipe(tmp_path, "whole", update=update)
    assert server.run("train", whole, cwd=tmp_path)[0] == 0
    assert_same(tmp_path / "run", tmp_path / "whole")
