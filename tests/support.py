"""What tests share: small recipes, real processes, and rows without what depends on the machine."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

TEXT = "".join(
    f"Line {i}: the {['quick', 'brown', 'fox'][i % 3]} jumps over {i * 7 % 11} lazy dogs.\n"
    for i in range(400)
)


def lm_tree(folder: Path, **changes: Any) -> dict[str, Any]:
    """A recipe tree that trains a 1-layer model on `TEXT` in about a second."""
    path = folder / "text.txt"
    path.write_text(TEXT)
    return merge(
        {
            "name": "tiny",
            "run_dir": str(folder / "run"),
            "model": {"kind": "tiny", "hidden_size": 32, "layers": 1, "heads": 2},
            "data": {"kind": "text", "path": str(path), "shuffle_window": 50},
            "objective": {"kind": "lm", "seq_len": 32},
            "optimizer": {"kind": "adamw", "lr": 3e-3},
            "loop": {"steps": 8, "batch_size": 8, "save_every": 3},
        },
        changes,
    )


def sft_rows(count: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{i % 13} plus {i % 7} is ", "completion": str(i % 13 + i % 7)}
        for i in range(count)
    ]


def sft_tree(folder: Path, **changes: Any) -> dict[str, Any]:
    """The same for prompt + completion rows."""
    path = write_jsonl(folder / "rows.jsonl", sft_rows(60))
    tree = lm_tree(folder)
    tree["data"] = {"kind": "jsonl", "path": str(path)}
    tree["objective"] = {"kind": "sft", "max_length": 64}
    return merge(tree, changes)


def merge(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` laid over `tree`; a section with another `kind` replaces the old one."""
    for key, value in changes.items():
        old = tree.get(key)
        switches = isinstance(value, dict) and isinstance(old, dict)
        if switches and value.get("kind", old.get("kind")) == old.get("kind"):
            tree[key] = merge(dict(old), value)
        else:
            tree[key] = value
    return tree


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_recipe(path: Path, tree: dict[str, Any]) -> Path:
    import yaml

    path.write_text(yaml.safe_dump(tree))
    return path


def train_here(tree: dict[str, Any]) -> dict[str, Any]:
    """A whole run in this process; returns its summary."""
    from rich.console import Console

    from mnemic.train.recipe.load import build_recipe
    from mnemic.train.run import run

    return run(build_recipe(tree), Console(file=sys.stdout, soft_wrap=True))


def rows_of(run_dir: Path | str, *, perf: bool = False) -> list[dict[str, Any]]:
    """metrics.jsonl without the keys that depend on the machine."""
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if perf or not k.startswith("perf/")} for row in rows]


def weights_of(folder: Path | str) -> dict[str, Any]:
    from safetensors.torch import load_file

    folder = Path(folder)
    found = [folder / n for n in ("model.safetensors", "adapter_model.safetensors")]
    return load_file(next(path for path in found if path.exists()))


def same_weights(a: dict[str, Any], b: dict[str, Any]) -> bool:
    import torch

    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def mnemic(
    *args: Any, cwd: Path, env: dict[str, str] | None = None, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "mnemic.train.cli", *map(str, args)],
        cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip


class ForkServer:
    """A process with torch, transformers and peft imported that forks one `mnemic` per request.

    Each request is a real process with its own files and signals; only the seconds of import are
    saved. The server itself runs no tensor operation, so no thread pool is inherited.
    """

    CODE = """
import json, os, sys
from mnemic.train.lazy_dynamo import put_off_dynamo
put_off_dynamo()
import torch, transformers, accelerate, peft, safetensors.torch, rich.console, yaml
import transformers.models.llama.modeling_llama
import mnemic.train.build, mnemic.train.trainer, mnemic.train.run, mnemic.train.export
from mnemic.train.cli import main
print("ready", flush=True)
for line in sys.stdin:
    job = json.loads(line)
    pid = os.fork()
    if pid == 0:
        out = os.open(job["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1); os.dup2(out, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1); sys.stderr = os.fdopen(2, "w", buffering=1)
        os.chdir(job["cwd"]); os.environ.update(job["env"])
        code = 70
        try:
            code = main(job["args"])
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            import traceback; traceback.print_exc()
        finally:
            sys.stdout.flush(); sys.stderr.flush(); os._exit(code)
    print(pid, flush=True)
    _, status = os.waitpid(pid, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""

    def __init__(self) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.CODE],
            env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert self._read() == "ready"

    def _read(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def run(
        self,
        *args: Any,
        cwd: Path,
        env: dict[str, str] | None = None,
        kill_after: float | None = None,
        kill_when: Callable[[], bool] | None = None,
        kill_signal: int = signal.SIGKILL,
    ) -> tuple[int, str]:
        """Exit status and output.

        After `kill_after` seconds, or once `kill_when()` holds, it gets `kill_signal`; a process
        killed by a signal has a negative status.
        """
        out = cwd / f"out-{time.monotonic_ns()}.txt"
        job = {"args": list(map(str, args)), "cwd": str(cwd), "out": str(out), "env": env or {}}
        assert self.process.stdin
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        pid = int(self._read())
        # The server reaps a process that ends by itself: then there is nobody to kill.
        with suppress(ProcessLookupError):
            if kill_after is not None:
                time.sleep(kill_after)
                os.kill(pid, kill_signal)
            elif kill_when is not None:
                while not kill_when():
                    time.sleep(0.005)
                    os.kill(pid, 0)
                os.kill(pid, kill_signal)
        status = int(self._read())
        return status, out.read_text() if out.exists() else ""

    def close(self) -> None:
        self.process.stdin.close()  # type: ignore[union-attr]
        self.process.wait(timeout=30)
