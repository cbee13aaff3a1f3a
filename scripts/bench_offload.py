"""Memory, disk traffic and time of training from an SSD: our streamed update beside AdamW in RAM
and DeepSpeed ZeRO-3 with NVMe offload.

    python scripts/bench_offload.py [--sizes 58 232] [--repeats 3] [--depths] [--json FILE]

Each arm runs in a fresh process with one thread, from the same checkpoint on the same token ids:
bf16 compute, batch 1, gradient checkpointing, no clipping, no decay. `offload_worker.py` runs ours,
`deepspeed_worker.py` the peers and says how they are set. Arms take turns; figures are medians over
repeats. Peak is ru_maxrss less the resident size after imports; on a CPU what a GPU would hold is
part of it in every arm. Seconds and bytes are medians over the steps after the first two, bytes as
the kernel counts them for the process. Losses must agree with those of AdamW in RAM, so `loss 1`
and `last loss` stand in the table.

Only `ds_nvme_tuned` gets malloc's settings by environment (ours sets what it needs by itself).
DeepSpeed comes with the extra `offload` and compiles its operators at the first run, which takes
minutes; `--deepspeed-python` names an interpreter that has it, where this one has not.

adamw_peak_vs_deepspeed_tuned, adamw_time_vs_deepspeed_tuned and mini_written_vs_deepspeed are ours
over tuned DeepSpeed at the largest size; peak_per_layer is `ours_adamw` with 32 layers over itself
with 8 (`--depths`).
"""

import argparse
import json
import multiprocessing
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OURS = ("ours_adamw", "ours_8bit", "ours_bf16", "ours_mini")
PEERS = ("adamw_ram", "ds_nvme_default", "ds_nvme_tuned")
ARMS = (*PEERS, "ds_cpu", *OURS)
# Million parameters: width, width inside the MLP, layers, heads, vocabulary.
SHAPES = {
    1: (128, 384, 2, 2, 2048),
    58: (512, 1376, 8, 8, 32000),
    232: (1024, 2816, 13, 16, 32000),
}
DEPTHS = (8, 16, 32)
DROPPED = 2
# glibc otherwise keeps a quarter to a third of DeepSpeed's resident size in freed blocks.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "262144",
    "MALLOC_TRIM_THRESHOLD_": "1048576",
    "MALLOC_ARENA_MAX": "2",
}
TIMEOUT = 3600


def save_checkpoint(shape: tuple[int, ...], folder: Path) -> None:
    """A Llama with random weights in bf16, as `save_pretrained` writes it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    hidden, inside, layers, heads, vocabulary = shape
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=inside,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=2048, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def checkpoint(shape: tuple[int, ...], folder: Path) -> Path:
    """The folder of that model, made once, in a process of its own: a child inherits the resident
    size of the process that starts it as the floor of its ru_maxrss, so this one stays small.
    """
    path = folder / ("llama-" + "-".join(map(str, shape)))
    if not (path / "model.safetensors").is_file():
        spawn = multiprocessing.get_context("spawn")
        child = spawn.Process(target=save_checkpoint, args=(shape, path))
        child.start()
        child.join()
        if child.exitcode:
            raise RuntimeError(f"{path}: making the checkpoint failed")
    return path


def token_ids(vocabulary: int, steps: int, tokens: int, folder: Path) -> Path:
    """Ids of few frequent and many rare tokens, so that there is something to learn."""
    draw = random.Random(0)
    weights = [1 / (rank + 1) ** 1.2 for rank in range(vocabulary)]
    rows = [draw.choices(range(vocabulary), weights, k=tokens) for _ in range(steps)]
    path = folder / f"ids-{vocabulary}-{steps}-{tokens}.json"
    path.write_text(json.dumps(rows))
    return path


def missing(arm: str, python: str) -> str | None:
    """Why an arm cannot run."""
    if arm.startswith("ds_"):
        look = "import importlib.util as u, sys; sys.exit(u.find_spec('deepspeed') is None)"
        if subprocess.run([python, "-c", look], check=False).returncode:
            return f"{python} has no deepspeed; name one that has with --deepspeed-python"
    elif arm in OURS and not (HERE / "offload_worker.py").is_file():
        return "scripts/offload_worker.py is not there"
    return None


def run(arm: str, model: Path, ids: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The JSON line of one fresh process; RuntimeError with its last words if it fails."""
    work = args.dir / f"work-{arm}"
    shutil.rmtree(work, ignore_errors=True)
    python = args.deepspeed_python if arm.startswith("ds_") else sys.executable
    worker = "offload_worker.py" if arm in OURS else "deepspeed_worker.py"
    command = [
        python, str(HERE / worker), "--arm", arm, "--model", str(model), "--work", str(work),
        "--ids", str(ids), "--tokens", str(args.tokens), "--steps", str(args.steps),
        "--lr", str(args.lr), "--seed", "0",
    ]  # fmt: skip
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env |= MALLOC if arm == "ds_nvme_tuned" else {}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(
            f"no end after {TIMEOUT} s; a `lock` file left in DeepSpeed's folder of extensions "
            "makes it wait for ever"
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    # An arm that has answered may still be killed by its libraries while the interpreter ends.
    if not done.stdout.strip():
        raise RuntimeError(f"exit {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def figures(report: dict[str, Any]) -> dict[str, float]:
    """What the table shows of one run."""

    def median(key: str) -> float:
        values = report[key]
        return statistics.median(values[DROPPED:] or values)

    return {
        "peak_over_imports": report["peak_rss"] - report["rss_after_imports"],
        "rss_after_imports": report["rss_after_imports"],
        "seconds_per_step": median("step_seconds"),
        "read_per_step": median("read_bytes_per_step"),
        "written_per_step": median("written_bytes_per_step"),
        "disk_bytes": report["disk_bytes"],
        "first_loss": report["losses"][0],
        "last_loss": report["losses"][-1],
        "init_seconds": report["init_seconds"],
        "vm_lck": report.get("vm_lck", 0),
    }


def measure(cases: list[tuple[str, str, Path, Path]], args: argparse.Namespace) -> list[Any]:
    """Rows of (name, arm, model, ids); the arms take turns in each repeat."""
    found: dict[str, list[dict[str, Any]]] = {}
    for turn in range(args.repeats):
        for name, arm, model, ids in cases:
            try:
                found.setdefault(name, []).append(run(arm, model, ids, args))
            except RuntimeError as error:
                args.failed.append(name)
                print(f"{name}: {error}", flush=True)
            else:
                over = figures(found[name][-1])["peak_over_imports"] / 2**20
                print(f"{name}: +{over:.0f} MiB, run {turn + 1}/{args.repeats}", flush=True)
    rows = []
    for name, reports in found.items():
        if not reports:
            continue
        all_figures = [figures(report) for report in reports]
        row: dict[str, Any] = {"name": name, "runs": len(reports)}
        for key in all_figures[0]:
            row[key] = statistics.median(one[key] for one in all_figures)
        row["losses"] = reports[0]["losses"]
        row["versions"] = reports[0].get("versions", {})
        rows.append(row)
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    print(
        f"\n{'':<26}{'peak MiB':>9}{'s/step':>8}{'read MB':>9}{'written':>9}{'disk MB':>9}"
        f"{'loss 1':>9}{'last':>9}{'init s':>8}"
    )
    for row in rows:
        print(
            f"{row['name']:<26}{row['peak_over_imports'] / 2**20:>9.0f}"
            f"{row['seconds_per_step']:>8.2f}{row['read_per_step'] / 1e6:>9.0f}"
            f"{row['written_per_step'] / 1e6:>9.0f}{row['disk_bytes'] / 1e6:>9.0f}"
            f"{row['first_loss']:>9.4f}{row['last_loss']:>9.4f}{row['init_seconds']:>8.1f}"
        )


def ratios_of(rows: list[dict[str, Any]], size: int) -> dict[str, float]:
    """The ratios, as far as their arms ran."""
    table = {row["name"]: row for row in rows}
    tuned = f"{size}M ds_nvme_tuned"
    pairs = {
        "adamw_peak_vs_deepspeed_tuned": (f"{size}M ours_adamw", tuned, "peak_over_imports"),
        "adamw_time_vs_deepspeed_tuned": (f"{size}M ours_adamw", tuned, "seconds_per_step"),
        "mini_written_vs_deepspeed": (f"{size}M ours_mini", tuned, "written_per_step"),
        "peak_per_layer": (
            f"ours_adamw, {DEPTHS[-1]} layers", f"ours_adamw, {DEPTHS[0]} layers",
            "peak_over_imports",
        ),
    }  # fmt: skip
    return {
        key: table[ours][figure] / table[theirs][figure]
        for key, (ours, theirs, figure) in pairs.items()
        if ours in table and theirs in table and table[theirs][figure]
    }


def filesystem(folder: Path) -> str:
    """The kind of file system that holds `folder`."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    holding = [(len(at), kind) for at, kind in mounts if folder.resolve().is_relative_to(at)]
    return max(holding)[1] if holding else "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description="Training from an SSD, beside DeepSpeed.")
    parser.add_argument("--sizes", type=int, nargs="+", default=[58, 232], choices=SHAPES)
    parser.add_argument("--arms", nargs="+", default=[*PEERS, *OURS], choices=ARMS)
    parser.add_argument("--steps", type=int, default=8, help="the first two are dropped")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--depths", action="store_true", help="8, 16 and 32 layers of 58 M's width")
    parser.add_argument("--deepspeed-python", default=sys.executable, metavar="PATH")
    parser.add_argument("--dir", type=Path, help="on a real disk; by default a temporary one here")
    parser.add_argument("--quick", action="store_true", help="a tiny model, under a minute")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    if args.quick:
        args.sizes, args.steps, args.tokens = [1], 4, 16
        args.arms = [a for a in args.arms if a not in ("ds_nvme_default", "ours_8bit", "ours_bf16")]
    args.failed = []
    if args.dir:
        args.dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.dir or Path.cwd(), prefix="bench-offload-") as name:
        # Checkpoints stay in a folder that was named; what arms write never does.
        kept, args.dir = args.dir or Path(name), Path(name).resolve()
        if (kind := filesystem(args.dir)) in ("tmpfs", "ramfs"):
            parser.error(f"{args.dir} is on {kind}, which is memory; name a disk with --dir")
        reasons = {arm: missing(arm, args.deepspeed_python) for arm in ARMS}
        for arm in args.arms:
            if reasons[arm]:
                print(f"{arm}: left out, {reasons[arm]}")
        cases = []
        for size in args.sizes:
            shape = SHAPES[size]
            ids = token_ids(shape[-1], args.steps, args.tokens, kept)
            for arm in args.arms:
                if not reasons[arm]:
                    cases.append((f"{size}M {arm}", arm, checkpoint(shape, kept), ids))
        if args.depths and not reasons["ours_adamw"]:
            width, inside, _, *rest = SHAPES[58]
            ids = token_ids(rest[-1], args.steps, args.tokens, kept)
            for layers in DEPTHS:
                path = checkpoint((width, inside, layers, *rest), kept)
                cases.append((f"ours_adamw, {layers} layers", "ours_adamw", path, ids))
        rows = measure(cases, args)
    show(rows)
    ratios = ratios_of(rows, max(args.sizes))
    for key, value in ratios.items():
        print(f"{key}: {value:.3f}")
    if args.json:
        env = {
            "python": platform.python_version(), "machine": platform.machine(),
            "cores": os.cpu_count(), "load": os.getloadavg(), "filesystem": kind,
            "steps": args.steps, "tokens": args.tokens, "repeats": args.repeats,
        }  # fmt: skip
        report = {"rows": rows, "ratios": ratios, "env": env}
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    if args.failed:
        sys.exit(f"failed: {', '.join(args.failed)}")


if __name__ == "__main__":
    main()
