"""The folders of a streamed run: whose they are, who is in them, what a dead run left there."""

import os
import re
import shutil
import subprocess
import sys

import pytest

from mnemic.train.errors import UserError
from mnemic.train.offload.work import DATA, MANIFEST, OWNER, WorkFolders

LEFT = ("gradients.bin", "activations.bin", "activations-k3x.bin", ".commit.tmp", ".owner.tmp")


def run_folder(tmp_path, name="run"):
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    return folder


def claimed(run, given=()):
    work = WorkFolders(run, [str(path) for path in given])
    work.claim()
    return work


def leave(work):
    """As a run that committed and ended: its files stay, its lock goes."""
    for path in work.paths:
        (path / DATA).write_bytes(b"weights")
    (work.paths[0] / MANIFEST).write_bytes(b"commit")
    work.release()


def test_the_run_folder_holds_them_unless_a_path_is_given(tmp_path):
    run, disk = run_folder(tmp_path), run_folder(tmp_path, "disk")
    assert claimed(run).paths == (run / "offload",)
    (path,) = claimed(run, [disk]).paths
    assert path.parent == disk and path.name.startswith("mnemic-run-") and path.is_dir()
    # Another run of that name, from elsewhere, has another folder there.
    (tmp_path / "elsewhere").mkdir()
    other = claimed(run_folder(tmp_path / "elsewhere"), [disk])
    assert other.paths[0].parent == disk and other.paths[0] != path


def test_relative_paths_and_the_run_folder_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = run_folder(tmp_path)
    run_folder(tmp_path, "disk")
    (path,) = claimed(run, ["disk"]).paths
    assert (tmp_path / "disk" / path.name).is_dir()
    assert claimed(run, [run]).paths[0].parent == run


@pytest.mark.parametrize("given", ["missing", "file", "missing beside a good one", "twice"])
def test_paths_that_cannot_be(tmp_path, given):
    run, disk = run_folder(tmp_path), run_folder(tmp_path, "disk")
    (tmp_path / "file").write_text("mine")
    paths, words = {
        "missing": ([tmp_path / "no"], "no is not a folder; give an existing one"),
        "file": ([tmp_path / "file"], "file is not a folder"),
        "missing beside a good one": ([disk, tmp_path / "no"], "no is not a folder"),
        "twice": ([disk, tmp_path / "run" / ".." / "disk"], "disk is given twice"),
    }[given]
    with pytest.raises(UserError, match=words):
        claimed(run, paths)
    assert list(disk.iterdir()) == [] and (tmp_path / "file").read_text() == "mine"


def test_a_file_in_the_place_of_the_folder(tmp_path):
    run = run_folder(tmp_path)
    (run / "offload").write_text("mine")
    with pytest.raises(UserError, match="offload cannot be written: File exists; set offload"):
        claimed(run)
    assert (run / "offload").read_text() == "mine"


def test_a_dead_run_leaves_nothing_behind_and_foreign_files_stay(tmp_path):
    run, disks = run_folder(tmp_path), [run_folder(tmp_path, name) for name in ("one", "two")]
    work = claimed(run, disks)
    leave(work)
    foreign = [disk / name for disk in disks for name in (*LEFT, DATA, MANIFEST, "notes.txt")]
    foreign += [path / "notes.txt" for path in work.paths]
    for path in foreign:
        path.write_text("mine")
    for path in work.paths:
        for name in LEFT:
            (path / name).write_bytes(b"left")
    again = claimed(run, disks)
    for path in again.paths:
        kept = {OWNER, "lock", DATA, "notes.txt"} | (
            {MANIFEST} if path == again.paths[0] else set()
        )
        assert {p.name for p in path.iterdir()} == kept
        assert (path / DATA).read_bytes() == b"weights"
    assert all(path.read_text() == "mine" for path in foreign)


def test_weights_without_a_commit_are_no_model(tmp_path):
    """A run killed while it wrote its first weights; the next one's model may be another."""
    run, disks = run_folder(tmp_path), [run_folder(tmp_path, name) for name in ("one", "two")]
    work = claimed(run, disks)
    leave(work)
    (work.paths[0] / MANIFEST).unlink()
    again = claimed(run, disks)
    assert [(path / DATA).exists() for path in again.paths] == [False, False]


@pytest.mark.parametrize("gone", [0, 1])
def test_a_disk_that_is_not_mounted(tmp_path, gone):
    """Its folder is there and empty. The other disk's half of the commit must not be lost."""
    run, disks = run_folder(tmp_path), [run_folder(tmp_path, name) for name in ("one", "two")]
    work = claimed(run, disks)
    leave(work)
    hidden = work.paths[gone].rename(tmp_path / "hidden")
    words = rf"{disks[gone]}/.*/data.bin is missing, and .* mounted\?\), or delete {disks[0]}/"
    for _ in range(2):
        with pytest.raises(UserError, match=words):
            claimed(run, disks)
    # Mounted again, the run is whole.
    shutil.rmtree(work.paths[gone])
    hidden.rename(work.paths[gone])
    claimed(run, disks).release()
    assert (work.paths[0] / MANIFEST).exists()
    assert all((path / DATA).read_bytes() == b"weights" for path in work.paths)
    # The other advice works as well.
    shutil.rmtree(work.paths[gone])
    with pytest.raises(UserError) as caught:
        claimed(run, disks)
    named = re.search("or delete (.*) to go on", str(caught.value))
    assert named and named[1].split(" and ") == [str(path) for path in work.paths]
    for path in work.paths:
        shutil.rmtree(path)
    claimed(run, disks)


def test_another_process_is_named_and_a_dead_one_holds_nothing(tmp_path):
    run, disk = run_folder(tmp_path), run_folder(tmp_path, "disk")
    code = (
        "import sys; from pathlib import Path; from mnemic.train.offload.work import WorkFolders\n"
        "work = WorkFolders(Path(sys.argv[1]), sys.argv[2:]); work.claim()\n"
        "print('claimed', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code, run, disk],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert other.stdout and other.stdout.readline() == "claimed\n"
    (note,) = disk.glob("mnemic-run-*")
    (note / "activations.bin").write_bytes(b"in use")
    words = rf"is in use by another mnemic process \(pid {other.pid}\); wait for it, or choose"
    with pytest.raises(UserError, match=words):
        claimed(run, [disk])
    assert (note / "activations.bin").exists()
    other.kill()
    other.communicate()
    work = claimed(run, [disk])
    assert (note / "lock").read_text() == str(os.getpid())
    assert not (note / "activations.bin").exists()
    work.release()
    claimed(run, [disk])


def test_a_second_claim_that_fails_holds_no_lock(tmp_path):
    run, disks = run_folder(tmp_path), [run_folder(tmp_path, name) for name in ("one", "two")]
    first = WorkFolders(run, [str(disks[1])])
    first.claim()
    both = WorkFolders(run, [str(disk) for disk in disks])
    with pytest.raises(UserError, match="in use"):
        both.claim()
    # It had locked the first disk's folder before the second one's failed.
    claimed(run, [disks[0]])


def test_a_run_folder_that_was_moved_keeps_its_own_offload_folder(tmp_path):
    run = run_folder(tmp_path)
    leave(claimed(run))
    moved = run.rename(tmp_path / "moved")
    work = claimed(moved)
    assert (work.paths[0] / DATA).exists()
    assert (moved / "offload" / OWNER).read_text() == str(moved)


def test_a_folder_of_another_run_is_refused(tmp_path):
    run, disk = run_folder(tmp_path), run_folder(tmp_path, "disk")
    work = claimed(run, [disk])
    (work.paths[0] / OWNER).write_text("/some/other/run")
    work.release()
    with pytest.raises(UserError, match="belongs to the run /some/other/run; choose another path"):
        claimed(run, [disk])
    # A process killed while it noted its name leaves no riddle.
    (work.paths[0] / OWNER).write_text("")
    claimed(run, [disk])
    assert (work.paths[0] / OWNER).read_text() == str(run)
