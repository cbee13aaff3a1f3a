"""The end of a rank: its work is done, and its launcher is told so."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.dist

HANDLERS = """
import atexit, sys, threading, time
from mnemic.train.leave import leave

class Held:
    def __del__(self):
        print("taken down")

held = Held()
threading.Thread(target=lambda: (time.sleep(0.3), print("thread done"))).start()
atexit.register(print, "handler ran")
print("left", end=" ")
leave(3)
"""


@pytest.mark.parametrize(("ranks", "last"), [(1, "taken down\n"), (2, "")])
def test_all_but_the_interpreters_end_is_the_same(ranks, last):
    done = subprocess.run(
        [sys.executable, "-c", HANDLERS], capture_output=True, text=True, timeout=60,
        env={**os.environ, "WORLD_SIZE": str(ranks)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout == f"left thread done\nhandler ran\n{last}"


COLLECTIVE = """
import atexit, ctypes, os, sys, time
# The last handler of all: does not let go of the interpreter until the other rank has come.
atexit.register(ctypes.PyDLL(None).sleep, 4)
import torch
import torch.distributed as dist
from mnemic.train.leave import leave

rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method=sys.argv[1], rank=rank, world_size=2)
if rank == 1:
    time.sleep(2)
dist.all_reduce(torch.ones(4), async_op=True)
if rank == 1:
    time.sleep(4)
    os._exit(0)
leave(0)
"""


def test_a_collective_that_ends_late_does_not_abort_the_rank(tmp_path):
    """With sys.exit for leave the status is -6 (Python 3.11, torch 2.13)."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", COLLECTIVE, f"file://{tmp_path}/meet"],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"}, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        _, told = ranks[0].communicate(timeout=120)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
            rank.stderr.close()
    assert ranks[0].returncode == 0, told.decode()
