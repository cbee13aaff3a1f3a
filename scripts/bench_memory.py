"""Peak memory of full-parameter fine-tuning, by optimizer and update: whole runs, one after
another.

    python scripts/bench_memory.py --data FILE

Each row is `mnemic train finetune_apollo_mini` (SmolLM2-135M, bf16 weights, all 134.5 M parameters)
for a few steps in a process of its own, with the optimizer and the update changed. The figure is
the highest resident size of any step from the second on, less that of a process that has
imported what training imports and made one step of a tiny model. What the model and its
activations need is in every row.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROWS = {
    "adamw, plain": ["optimizer.kind=adamw", "update.kind=plain"],
    "adamw, in_backward": ["optimizer.kind=adamw"],
    "apollo rank 1/4, plain": ["optimizer.kind=apollo", "update.kind=plain"],
    "apollo rank 1/4, in_backward": ["optimizer.kind=apollo"],
    "apollo-mini, plain": ["update.kind=plain"],
    "apollo-mini, in_backward": [],
    "apollo-mini, in_backward, int8 weights": ["model.weights=int8"],
}
IMPORTS = """
from mnemic.train.lazy_dynamo import put_off_dynamo
put_off_dynamo()  # as the command does
import torch
from mnemic.train.callbacks.memory import host_peak_bytes
from mnemic.train.plan.machine import imports_bytes
from mnemic.train.recipe.load import load_recipe
imports_bytes(load_recipe("finetune_apollo_mini", [])[0], torch.device("cpu"))
print(host_peak_bytes())
"""


def imports_bytes() -> int:
    """Peak of a process that imports what training does and makes one step of a tiny model: code is
    resident once it has run.
    """
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS], check=True, capture_output=True, text=True
    )
    return int(done.stdout.split()[-1])


def run(name: str, overrides: list[str], folder: Path, data: Path, steps: int) -> dict[str, Any]:
    """One run; peaks in bytes and the median seconds of a step."""
    run_dir = folder / name.replace(" ", "-").replace("/", "-")
    subprocess.run(
        [sys.executable, "-m", "mnemic.train.cli", "train", "finetune_apollo_mini",
         f"data.path={data}", f"run_dir={run_dir}", "evaluation=null", f"loop.steps={steps}",
         f"loop.save_every={steps}", "loop.schedule.warmup=0", *overrides],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["step"] >= 2]
    seconds = sorted(row["perf/step_seconds"] for row in rows)
    return {
        "name": name,
        "step_peak_bytes": max(row["perf/host_peak_bytes"] for row in rows),
        "run_peak_bytes": json.loads((run_dir / "summary.json").read_text())["host_peak_bytes"],
        "seconds_per_step": seconds[len(seconds) // 2],
        "last_loss": rows[-1]["loss"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of full-parameter fine-tuning.")
    parser.add_argument("--data", type=Path, help="a text file; by default made-up sentences")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--quick", action="store_true", help="two rows, a tiny model")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    base = imports_bytes()
    found = []
    print(f"imports alone: {base / 2**20:.0f} MiB")
    print(f"{'':<42}{'step peak over imports':>24}{'run peak':>12}{'s/step':>9}")
    with tempfile.TemporaryDirectory() as name:
        data = (args.data or _sentences(Path(name))).resolve()
        for row_name, overrides in ROWS.items():
            steps = args.steps
            if args.quick:
                if "plain" not in row_name or "rank" in row_name:
                    continue
                steps = 3
                overrides = [*overrides, "model.kind=tiny", "model.hidden_size=768"]
            row = run(row_name, overrides, Path(name), data, steps)
            row["step_peak_over_imports"] = row["step_peak_bytes"] - base
            found.append(row)
            print(
                f"{row_name:<42}{row['step_peak_over_imports'] / 2**20:>20.0f} MiB"
                f"{row['run_peak_bytes'] / 2**20:>8.0f} MiB{row['seconds_per_step']:>9.2f}",
                flush=True,
            )
    over = {row["name"]: row["step_peak_over_imports"] for row in found}
    ratios = {f"{n} vs adamw, plain": over[n] / over["adamw, plain"] for n in list(over)[1:]}
    for key, value in ratios.items():
        print(f"{key}: {value:.2f}")
    if args.json:
        env = {"python": platform.python_version(), "imports_bytes": base, "steps": args.steps}
        report = {"rows": found, "ratios": ratios, "env": env}
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")


def _sentences(folder: Path) -> Path:
    path = folder / "text.txt"
    path.write_text("".join(f"Sentence number {i} is about nothing.\n" for i in range(5000)))
    return path


if __name__ == "__main__":
    main()
