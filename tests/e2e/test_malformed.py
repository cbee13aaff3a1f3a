"""Bad input to the real command: one clear sentence, status 1 or 2, no traceback, nothing lost."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from support import lm_tree, mnemic, rows_of, sft_rows, sft_tree, write_jsonl, write_recipe


def snapshot(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name != ".lock"
    }


def check(status: int, output: str, expected: int, words: list[str]) -> None:
    sentences = [line for line in output.splitlines() if line.startswith("mnemic: ")]
    assert status == expected, output
    assert len(sentences) == 1, output
    assert "Traceback" not in output, output
    for word in words:
        assert word in sentences[0], f"{word!r} is not in {sentences[0]!r}"


# The recipe as text -> exit status and words of the sentence. Nothing heavy is imported for these.
RECIPES = {
    "typo in a key": (lambda t: t | {"optmizer": t.pop("optimizer")}, None),
    "typo in a nested key": (
        lambda t: t | {"loop": t["loop"] | {"batchsize": 4}},
        ["loop.batchsize: unknown key", "did you mean 'batch_size'?"],
    ),
    "typo in a kind": (
        lambda t: t | {"objective": {"kind": "stf"}},
        ["objective.kind", "'stf' is not one of lm, sft", "did you mean 'sft'?"],
    ),
    "a word for a number": (
        lambda t: t | {"loop": t["loop"] | {"steps": "many"}},
        ["loop.steps: 'many' should be a valid integer"],
    ),
    "a negative rate": (
        lambda t: t | {"optimizer": {"kind": "adamw", "lr": -1}},
        ["optimizer.lr: -1 should be greater than 0"],
    ),
    "a list for a section": (
        lambda t: t | {"loop": [1, 2]},
        ["loop: [1, 2] is not a section of keys"],
    ),
    "a missing section": (
        lambda t: {k: v for k, v in t.items() if k != "data"},
        ["data: missing"],
    ),
    "steps and epochs": (
        lambda t: t | {"loop": t["loop"] | {"epochs": 2}},
        ["give exactly one of steps and epochs"],
    ),
    "a contradiction": (
        lambda t: t | {"objective": {"kind": "sft"}},
        ["data.kind=text has no prompts", "set objective.kind=lm"],
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_malformed_recipes(tmp_path, name):
    change, words = RECIPES[name]
    path = write_recipe(tmp_path / "r.yaml", change(lm_tree(tmp_path)))
    done = mnemic("train", path, cwd=tmp_path)
    if words is None:
        # The misspelt section and the missing one: two mistakes, two lines.
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert "optmizer: unknown key; did you mean 'optimizer'?" in done.stderr
        assert "optimizer: missing" in done.stderr
    else:
        check(done.returncode, done.stderr, 2, words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"name: [x\n", ["r.yaml: line 2", "not valid YAML"]),
        (os.urandom(512) + b"\xff\x00", ["r.yaml"]),
        (b"", ["r.yaml: the recipe is empty"]),
        (b"name: a\nname: b\n", ["line 2", "'name' stands twice"]),
    ],
)
def test_broken_recipe_files(tmp_path, content, words):
    (tmp_path / "r.yaml").write_bytes(content)
    done = mnemic("validate", "r.yaml", cwd=tmp_path)
    check(done.returncode, done.stderr, 2, words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "no-such"], ["no-such: no such file, and no shipped recipe of that name"]),
        (["train", "r.yaml", "loop.steps"], ["'loop.steps': overrides are written"]),
        (["train", "r.yaml", "data.path=nowhere.txt"], None),
        (["export", ".", "out"], None),
        (["generate", ".", "hi"], None),
        (["doctor", "nowhere"], None),
    ],
)
def test_bad_arguments(tmp_path, arguments, words):
    write_recipe(tmp_path / "r.yaml", lm_tree(tmp_path))
    done = mnemic(*arguments, cwd=tmp_path)
    if words:
        check(done.returncode, done.stderr, 2, words)
    else:
        known = {"train": "nowhere.txt not found", "doctor": "nowhere: not a folder"}
        check(done.returncode, done.stderr, 1, [known.get(arguments[0], ".: not a run folder")])


DATA = {
    "truncated jsonl": (
        lambda p: p.write_bytes(p.read_bytes()[:-9]),
        ["rows.jsonl:60: not valid JSON", "truncated file?", "data.on_bad_row=skip"],
    ),
    "binary junk": (
        lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe" + bytes(range(256)) * 9),
        ["rows.jsonl:1: not UTF-8 text"],
    ),
    "a list in a row": (
        lambda p: p.write_text("[1, 2]\n"),
        ["rows.jsonl:1: a JSON list, not an object"],
    ),
    "wrong columns": (
        lambda p: write_jsonl(p, [{"question": "x", "answer": "y"}]),
        ["rows.jsonl:1", "needs columns 'messages', or 'prompt' and 'completion'", "data.columns"],
    ),
    "a number for a text": (
        lambda p: write_jsonl(p, [*sft_rows(3), {"prompt": "x", "completion": 3}]),
        ["rows.jsonl:4", "prompt: str, not a list of messages"],
    ),
    "an empty file": (lambda p: p.write_bytes(b""), ["rows.jsonl is empty"]),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), ["rows.jsonl is a folder"]),
    "nothing there": (lambda p: p.unlink(), ["rows.jsonl not found"]),
}


@pytest.mark.parametrize("name", DATA)
def test_malformed_data_is_found_before_training(tmp_path, name):
    damage, words = DATA[name]
    path = write_recipe(tmp_path / "r.yaml", sft_tree(tmp_path))
    damage(tmp_path / "rows.jsonl")
    done = mnemic("train", path, cwd=tmp_path)
    check(done.returncode, done.stderr, 1, words)
    assert not (tmp_path / "run").exists()


def test_bad_rows_are_skipped_counted_and_reported_when_the_recipe_says_so(tmp_path, fork_server):
    path = write_recipe(tmp_path / "r.yaml", sft_tree(tmp_path))
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(rows.read_bytes() + b"{broken\n" * 3)
    status, output = fork_server.run("train", path, "data.on_bad_row=skip", "loop.steps=9",
                                     cwd=tmp_path)  # fmt: skip
    assert status == 0 and "3 bad rows will be skipped" in output
    assert f"{rows}:61: not valid JSON" in output
    assert rows_of(tmp_path / "run")[-1]["data/bad_rows"] == 3


CHECKPOINTS = {
    "a flipped byte in the weights": ("model.safetensors", "flip", ["damaged", "checksum"]),
    "a flipped byte in the state": ("trainer.pt", "flip", ["damaged", "checksum"]),
    "a cut manifest": ("manifest.json", "cut", ["manifest.json: damaged"]),
    "a missing file": ("trainer.pt", "delete", ["trainer.pt: missing"]),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_damaged_checkpoints(tmp_path, fork_server, name):
    file, damage, words = CHECKPOINTS[name]
    path = write_recipe(tmp_path / "r.yaml", lm_tree(tmp_path))
    assert fork_server.run("train", path, cwd=tmp_path)[0] == 0
    expected = rows_of(tmp_path / "run")
    target = tmp_path / "run" / "checkpoints" / "step-00000008" / file
    raw = bytearray(target.read_bytes())
    if damage == "flip":
        raw[len(raw) // 2] ^= 1
        target.write_bytes(raw)
    elif damage == "cut":
        target.write_bytes(raw[: len(raw) // 2])
    else:
        target.unlink()
    before = snapshot(tmp_path / "run")
    status, output = fork_server.run("train", path, cwd=tmp_path)
    older = "run/checkpoints/step-00000006"
    check(status, output, 1, [*words, older])
    assert snapshot(tmp_path / "run") == before
    # The advice in the sentence works, to the same numbers, and so does the next plain start.
    status, output = fork_server.run("train", path, f"loop.resume={tmp_path / older}", cwd=tmp_path)
    assert status == 0, output
    assert rows_of(tmp_path / "run") == expected
    assert fork_server.run("train", path, cwd=tmp_path)[0] == 0


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 1 MiB (needs root)."""
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk_keeps_what_is_there_and_the_run_goes_on_elsewhere(
    tmp_path, fork_server, small_disk
):
    tree = lm_tree(tmp_path, run_dir=str(small_disk / "run"), loop={"save_every": 2, "steps": 8})
    path = write_recipe(tmp_path / "r.yaml", tree)
    ballast = small_disk / "ballast"
    # Room for one checkpoint of about 240 KiB, not for a second.
    ballast.write_bytes(b"x" * (640 << 10))
    status, output = fork_server.run("train", path, cwd=tmp_path)
    check(status, output, 1, ["step 4 could not be written", "No space left", "step-00000002"])
    checkpoint = small_disk / "run" / "checkpoints" / "step-00000002"
    assert [p.name for p in checkpoint.parent.iterdir()] == ["step-00000002"]
    ballast.unlink()
    status, output = fork_server.run("train", path, "loop.keep_checkpoints=1", cwd=tmp_path)
    assert status == 0 and "resuming from" in output, output
    whole = write_recipe(tmp_path / "w.yaml", tree | {"run_dir": str(tmp_path / "whole")})
    assert fork_server.run("train", whole, cwd=tmp_path)[0] == 0
    assert rows_of(small_disk / "run") == rows_of(tmp_path / "whole")


def test_a_disk_filled_behind_our_back(tmp_path, fork_server, small_disk):
    """No room even for a metrics row: still a sentence."""
    tree = lm_tree(tmp_path, run_dir=str(small_disk / "run"))
    (small_disk / "run").mkdir()
    size = os.statvfs(small_disk)
    (small_disk / "ballast").write_bytes(b"x" * (size.f_bavail * size.f_frsize))
    path = write_recipe(tmp_path / "r.yaml", tree)
    status, output = fork_server.run("train", path, cwd=tmp_path)
    check(status, output, 1, ["cannot be written: No space left on device"])


@pytest.fixture
def read_only(tmp_path):
    """A read-only folder, for root too (a read-only tmpfs), else by its mode."""
    folder = tmp_path / "locked"
    folder.mkdir()
    if os.geteuid() != 0:
        folder.chmod(0o555)
        yield folder
        folder.chmod(0o755)
        return
    command = ["mount", "-t", "tmpfs", "-o", "size=1m,ro", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("root, but mounting is not allowed")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_read_only_folder(tmp_path, read_only):
    path = write_recipe(tmp_path / "r.yaml", lm_tree(tmp_path, run_dir=str(read_only / "run")))
    done = mnemic("train", path, cwd=tmp_path)
    check(
        done.returncode, done.stderr, 1, ["locked/run cannot be written", "choose another run_dir"]
    )


def test_a_run_folder_that_is_a_file(tmp_path):
    (tmp_path / "run").write_text("mine")
    path = write_recipe(tmp_path / "r.yaml", lm_tree(tmp_path))
    done = mnemic("train", path, cwd=tmp_path)
    check(done.returncode, done.stderr, 1, ["run is a file, not a folder"])
    assert (tmp_path / "run").read_text() == "mine"


def test_a_model_folder_that_is_none(tmp_path, fork_server):
    folder = tmp_path / "model"
    folder.mkdir()
    model = {"kind": "pretrained", "path": str(folder)}
    path = write_recipe(tmp_path / "r.yaml", lm_tree(tmp_path, model=model))
    status, output = fork_server.run("train", path, cwd=tmp_path)
    check(status, output, 1, ["has no config.json"])
    (folder / "config.json").write_text(json.dumps({"model_type": "nonsense"}))
    status, output = fork_server.run("train", path, cwd=tmp_path)
    check(status, output, 1, ["could not be loaded", "check the files in this folder"])
    shutil.rmtree(folder)
    status, output = fork_server.run("train", path, cwd=tmp_path)
    check(status, output, 1, ["model.path", "not found"])


def test_a_hub_name_without_a_hub(tmp_path, fork_server):
    model = {"kind": "pretrained", "path": "nobody/nothing"}
    path = write_recipe(tmp_path / "r.yaml", lm_tree(tmp_path, model=model))
    status, output = fork_server.run("train", path, cwd=tmp_path)
    check(status, output, 1, ["nobody/nothing could not be loaded", "HF_HUB_OFFLINE"])


def test_out_of_memory_of_a_real_process(tmp_path):
    """An address-space limit makes the real allocator fail in the first step."""
    tree = lm_tree(
        tmp_path,
        model={"kind": "tiny", "hidden_size": 256, "layers": 8, "heads": 4},
        objective={"kind": "lm", "seq_len": 1024},
        loop={"batch_size": 64},
        data={"shuffle": False},
    )
    path = write_recipe(tmp_path / "r.yaml", tree)
    code = (
        "import resource, sys, torch, transformers, accelerate, peft\n"
        "import mnemic.train.build, mnemic.train.trainer\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (600 << 20),) * 2)\n"
        "from mnemic.train.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    import sys

    done = subprocess.run(
        [sys.executable, "-c", code, "train", str(path)],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    words = ["step 1: out of memory on cpu with 64 rows of 1024 tokens",
             "loop.micro_batch_size=32 (same result)"]  # fmt: skip
    check(done.returncode, done.stderr, 1, words)
