"""A collection killed at any instant goes on to the same bytes: no reply lost, none there twice."""

import random
import signal
import subprocess
import sys
import time

import pytest
from distill_support import (
    TeacherServer,
    distill,
    gold_arguments,
    http_arguments,
    lines_of,
    prompt_of,
)

EPISODES = 6


def killed_at(size, out, arguments):
    """The command in a process of its own, killed once raw.jsonl has `size` bytes and more than
    before; whether it was alive then.
    """
    raw = out / "raw.jsonl"
    size = max(size, raw.stat().st_size + 1 if raw.exists() else 0)
    process = subprocess.Popen(
        [sys.executable, "-m", "mnemic.train.cli", "distill", "collect", *map(str, arguments)],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while process.poll() is None:
        if raw.exists() and raw.stat().st_size >= size:
            process.kill()
            break
        time.sleep(0.0005)
    _, output = process.communicate(timeout=60)
    assert process.returncode in (0, -signal.SIGKILL), output
    return process.returncode != 0


@pytest.mark.timeout(300)
@pytest.mark.parametrize("kills", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_9_while_collecting_loses_and_doubles_nothing(tmp_path, kills):
    whole = tmp_path / "whole"
    assert distill("collect", whole, *gold_arguments(EPISODES)) == 0
    gold = (whole / "raw.jsonl").read_bytes()
    known = {prompt_of(row): row["reply"] for row in lines_of(whole / "raw.jsonl")}
    server = TeacherServer(lambda prompt: known[prompt])
    draw = random.Random(7)
    hit = 0
    try:
        taught = tmp_path / "taught"
        over_http = [*http_arguments(server.url, EPISODES), "--concurrency", 4]
        assert distill("collect", taught, *over_http) == 0
        for name, arguments, want in (
            ("gold", gold_arguments(EPISODES), gold),
            ("http", over_http, (taught / "raw.jsonl").read_bytes()),
        ):
            for attempt in range(kills // 4):
                out = tmp_path / f"{name}{attempt}"
                instants = sorted(draw.uniform(0, 0.9) * len(want) for _ in range(2))
                for size in instants:
                    hit += killed_at(size, out, [out, *arguments])
                left = (out / "raw.jsonl").read_bytes()
                assert want.startswith(left)
                assert distill("collect", out, *arguments) == 0
                assert (out / "raw.jsonl").read_bytes() == want
    finally:
        server.close()
    assert hit >= kills * 0.75
