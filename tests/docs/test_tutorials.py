"""Each tutorial, from top to bottom in one fresh folder: its files are written, its commands run as
real processes, made smaller by `tutorial_support`, and show what the page says is seen.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from docs_support import ROOT, TUTORIALS, blocks, shell
from tutorial_support import ELSEWHERE, RUNS, Run

QUICK = {"tutorial-cpu-tests.md"}  # of the default suite; the others are slow
MINUTES = 10


def printed(page: Path) -> list[str]:
    return [c for block in blocks(page) if block.language == "sh" for c in shell(block.text)]


def environment() -> dict[str, str]:
    """Programs of this Python's environment first; no account, no colours, no line breaks, and a
    port for torchrun that no other run on this machine has.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    found = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "PYTEST_"))}
    bin_folder = str(Path(sys.executable).parent)
    return {
        **found, "PATH": f"{bin_folder}{os.pathsep}{found['PATH']}", "COLUMNS": "200",
        "WANDB_CONFIG_DIR": "wandb-config", "WANDB_CACHE_DIR": "wandb-cache",
        "WANDB_DATA_DIR": "wandb-data", "NETRC": "no-netrc", "NO_COLOR": "1",
        "PET_MASTER_PORT": port,
    }  # fmt: skip


def execute(
    command: str, folder: Path, *, kill_at: tuple[str, str] | None = None
) -> tuple[int, str]:
    """Status and output; `kill_at`: all its processes get SIGKILL once that is in the file."""
    log = folder / "output.txt"
    name, pattern = kill_at or (log.name, "")
    file = folder / name
    with log.open("w") as out:
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=folder, env=environment(), stdout=out, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 60 * MINUTES
        while process.poll() is None:
            assert time.monotonic() < deadline, f"{command}: {log.read_text()[-2000:]}"
            if kill_at and file.exists() and re.search(pattern, file.read_text()):
                break
            time.sleep(0.02)
        else:
            assert not kill_at, f"{command} ended before {pattern!r}:\n{log.read_text()[-2000:]}"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return process.returncode, log.read_text()


def smaller(command: str, run: Run) -> str:
    for old, new in run.swaps:
        assert command.count(old) == 1, f"{old!r} is not once in {command!r}"
        command = command.replace(old, new)
    return command


def follow(command: str, run: Run, folder: Path) -> str:
    """Runs one command and checks all of it that the page's text has no part in."""
    words, before = smaller(command, run), ""
    if run.kill_at:
        status, before = execute(words, folder, kill_at=run.kill_at)
        assert status == -signal.SIGKILL, before
    status, output = execute(words, folder)
    assert status == 0, f"{words}: status {status}\n{output[-3000:]}"
    output = before + output
    for pattern in (*run.shows, *run.writes):
        assert re.search(pattern, output), f"{words}: no {pattern!r} in\n{output[-3000:]}"
    for name in run.makes:
        assert list(folder.glob(name)), f"{words}: no {name}"
    if run.compare:
        run.compare(output)
    return output


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(p, id=p.stem, marks=() if p.name in QUICK else [pytest.mark.slow])
        for p in TUTORIALS
    ],
)
@pytest.mark.timeout(60 * MINUTES * 2)
def test_a_tutorial_goes_as_it_is_printed(page, tmp_path):
    if page.stem == "tutorial-wandb":
        pytest.importorskip("wandb")
    for name in ("docs", "recipes", "scripts"):  # they begin in a clone of the repository
        (tmp_path / name).symlink_to(ROOT / name)
    for block in blocks(page):
        if block.name:
            (tmp_path / block.name).write_text(block.text)
        if block.language != "sh":
            continue
        for command in shell(block.text):
            if command not in ELSEWHERE:
                assert command in RUNS[page.name], f"{block.where}: {command!r} is in no table"
                follow(command, RUNS[page.name][command], tmp_path)


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_every_command_is_run_or_named_with_a_reason(page):
    commands = printed(page)
    for command in commands:
        assert (command in RUNS[page.name]) != (command in ELSEWHERE), command
    assert [c for c in RUNS[page.name] if c not in commands] == []
    for command, run in RUNS[page.name].items():
        smaller(command, run)


def test_nothing_else_is_in_the_tables():
    assert {page.name for page in TUTORIALS} == set(RUNS)
    assert set(ELSEWHERE) <= {command for page in TUTORIALS for command in printed(page)}


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda page: page.stem)
def test_what_a_page_shows_is_what_the_run_is_held_to(page):
    """A text block has a pattern of a command above it, and each pattern is in its text block."""
    above: list[Run] = []

    def unseen() -> list[Run]:
        return [run for run in above if run.shows or run.compare]

    for block in blocks(page):
        if block.language == "sh":
            assert not unseen(), f"{block.where}: no text block shows what the command above writes"
            above = [RUNS[page.name][c] for c in shell(block.text) if c in RUNS[page.name]]
        elif block.language == "text":
            assert unseen(), f"{block.where}: nothing checks it"
            for run in above:
                for pattern in run.shows:
                    assert re.search(pattern, block.text), f"{block.where}: no {pattern!r}"
                if run.compare:
                    run.compare(block.text)
            above = []
    assert not unseen()


def test_a_command_that_fails_is_seen(tmp_path):
    with pytest.raises(AssertionError, match="status 2"):
        follow("mnemic train none", Run(), tmp_path)
    with pytest.raises(AssertionError, match="no 'there'"):
        follow("echo here", Run(writes=("there",)), tmp_path)
    with pytest.raises(AssertionError, match="no file"):
        follow("echo here", Run(makes=("file",)), tmp_path)
