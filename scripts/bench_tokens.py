"""Long rows: what exact savings and token sparsity take and give, each in a process of its own.

    python scripts/bench_tokens.py [--json FILE] [--rows layers:4096 layers:8192 smollm2:4096]

`saved`: what autograd keeps for the backward, each storage once, weights aside. `peak`: resident
bytes of a step above those before it, with an allocator that gives back what is freed. `seconds`:
of one CPU core, so that another process on the machine is not in them; the median of the steps
after the first. Dense is what transformers does with labels: all logits. Shown first are LoRA rows
of which the last 128 tokens are trained; `all` rows train every token.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("tokens_worker.py")
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "1",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "LRU_CACHE_CAPACITY": "32",
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
}  # fmt: skip
ARMS = [
    "dense", "dense, peft's fp32 adapters", "checkpoint", "loss without logits",
    "checkpoint + loss", "checkpoint + loss + tiled mlp", "sequence chunks + loss", "token_tune",
    "random-ltd", "lemo, no checkpoint", "lemo", "protect", "protect, keep 0.4",
    "protect, keep 0.5", "drop", "drop, no checkpoint", "drop, visible", "drop + sequence chunks",
    "truncation to half",
]  # fmt: skip
ALL = ["dense", "checkpoint", "loss without logits", "checkpoint + loss", "loss subsampling"]


def measure(arm: str, model: str, length: int, loss: str, steps: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(WORKER), arm, "--model", model, "--length", str(length),
         "--loss", loss, "--steps", str(steps)],
        capture_output=True, text=True, env={**os.environ, **MALLOC},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{arm}, {model}, {length}:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    return {"name": arm, "model": model, "length": length, "loss_on": loss, **found}


def show(row: dict[str, Any]) -> None:
    mib = 2**20
    print(
        f"{row['name']:<32}{row['saved_bytes'] / mib:>11.1f}{row['peak_bytes'] / mib:>11.0f}"
        f"{row['cpu_seconds']:>9.2f}{row['kept']:>8.2f}{row['supervised_dropped']:>9.0f}",
        flush=True,
    )  # fmt: skip


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of the longest rows of the layer-dominated model, where they were measured."""
    best = max(rows, key=lambda r: (r["model"] == "layers", r["length"]))
    mine = {
        r["name"]: r for r in rows
        if (r["model"], r["length"], r["loss_on"]) == (best["model"], best["length"], "answer")
    }  # fmt: skip
    wanted = {
        "exact_saved_vs_dense": ("dense", "checkpoint + loss", "saved_bytes"),
        "protect_speed_vs_exact": ("checkpoint + loss", "protect", "cpu_seconds"),
        "lemo_memory_vs_dense": ("dense", "lemo, no checkpoint", "peak_bytes"),
        "lemo_speed_vs_dense": ("dense", "lemo, no checkpoint", "cpu_seconds"),
    }
    return {
        key: mine[a][figure] / mine[b][figure]
        for key, (a, b, figure) in wanted.items() if a in mine and b in mine
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and time of long rows.")
    parser.add_argument(
        "--rows", nargs="+", default=["layers:4096", "layers:8192", "smollm2:4096"],
        metavar="MODEL:TOKENS",
    )  # fmt: skip
    parser.add_argument("--arms", nargs="+", choices=ARMS)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="the main arms at 1024 tokens")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    plan = [(m, int(n)) for m, n in (item.split(":") for item in args.rows)]
    arms, steps = args.arms or ARMS, args.steps
    if args.quick:
        plan, steps = [("layers", 1024)], 2
        arms = ["dense", "checkpoint + loss", "lemo, no checkpoint", "protect"]
    rows = []
    for model, length in plan:
        for loss in ("answer",) if args.quick or args.arms else ("answer", "all"):
            print(f"\n{model}, {length} tokens, trained: {loss}")
            print(
                f"{'':<32}{'saved MiB':>11}{'peak MiB':>11}{'seconds':>9}{'kept':>8}{'dropped':>9}"
            )
            for arm in arms if loss == "answer" else ALL:
                rows.append(measure(arm, model, length, loss, steps))
                show(rows[-1])
    found = ratios(rows)
    print("\n" + "\n".join(f"{key:<28}{value:.2f}" for key, value in found.items()))
    if args.json:
        import platform

        import torch
        import transformers

        env = {"torch": torch.__version__, "transformers": transformers.__version__,
               "machine": platform.processor() or platform.machine(), "threads": 1}  # fmt: skip
        text = json.dumps({"rows": rows, "ratios": found, "env": env}, indent=1)
        Path(args.json).write_text(text)


if __name__ == "__main__":
    main()
