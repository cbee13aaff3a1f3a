"""Everything at once beside each part alone and plain AdamW: peak memory, time, and loss, of whole
runs, one after another.

    python scripts/bench_together.py --data ROWS.jsonl [--steps 4] [--learn 40] [--json FILE]

Each row is `mnemic train lowmem_long` (SmolLM2-135M, bf16 weights, rows of 2,048 tokens, prompt and
completion; scripts/long_rows.py makes such) in a process of its own with parts taken out. The
peak is the highest resident size of any step from the second on, less that of a process that has
imported what training imports and made one step of a tiny model.

With --learn the recipe is also trained for as many steps beside its exact form (all tokens, in
memory, same optimizer) and AdamW, and the held-out losses, dense, of the same rows are shown.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench_memory import imports_bytes

PLAIN = ["update=plain", "offload=none", "tokens=none"]
ADAMW = ["optimizer={kind: adamw, lr: 2.0e-5}"]
ROWS: dict[str, list[str]] = {
    "AdamW, plain": [*PLAIN, *ADAMW],
    "AdamW, gradient checkpointing": [*PLAIN, *ADAMW, "loop.gradient_checkpointing=true"],
    "APOLLO-Mini alone": PLAIN,
    "SSD streaming alone (AdamW)": [*ADAMW, "tokens=none", "offload={kind: ssd}"],
    "token sparsity alone (AdamW)": ["update=plain", "offload=none", *ADAMW],
    "activations on the SSD alone (AdamW)": [
        "update=plain", "offload={kind: none, activations: ssd}", "tokens=none", *ADAMW,
    ],
    "all, AdamW": ADAMW,
    "all, every token": ["tokens=none"],
    "all": [],
}  # fmt: skip
LEARN = {
    "AdamW, all tokens": [*PLAIN, *ADAMW, "loop.gradient_checkpointing=true"],
    "APOLLO-Mini, all tokens": [*PLAIN, "loop.gradient_checkpointing=true"],
    "all": [],
}
FIRST, LAST = "AdamW, plain", "all"
QUICK = (FIRST, "all, every token", LAST)


def train(folder: Path, data: Path, overrides: list[str], steps: int) -> Path:
    run_dir = folder / f"run-{len(list(folder.iterdir()))}"
    done = subprocess.run(
        [sys.executable, "-m", "mnemic.train.cli", "train", "lowmem_long", f"data.path={data}",
         f"run_dir={run_dir}", f"loop.steps={steps}", *overrides],
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{overrides}: {done.stderr.strip()[-600:]}")
    return run_dir


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def memory(
    folder: Path, data: Path, steps: int, extra: list[str], base: int, names: Iterable[str]
) -> list[Any]:
    found = []
    print(f"{'':<40}{'peak over imports':>18}{'s/step':>9}{'loss at step 1':>16}")
    for name in names:
        run_dir = train(
            folder, data, [*ROWS[name], "evaluation=null", "loop.schedule.warmup=0", *extra], steps
        )
        rows = [row for row in rows_of(run_dir) if row["step"]]
        seconds = sorted(row["perf/step_seconds"] for row in rows[1:])
        row = {
            "name": name,
            "peak_over_imports": max(r["perf/host_peak_bytes"] for r in rows[1:]) - base,
            "run_peak_bytes": json.loads((run_dir / "summary.json").read_text())["host_peak_bytes"],
            "seconds_per_step": seconds[len(seconds) // 2],
            "first_loss": rows[0]["loss"],
        }
        found.append(row)
        print(
            f"{name:<40}{row['peak_over_imports'] / 2**20:>14.0f} MiB"
            f"{row['seconds_per_step']:>9.2f}{row['first_loss']:>16.4f}",
            flush=True,
        )
    return found


def learn(folder: Path, data: Path, steps: int, extra: list[str]) -> list[Any]:
    found = []
    print(f"\n{'held-out loss, all tokens seen':<40}{f'after {steps} steps':>18}")
    for name, overrides in LEARN.items():
        at = [f"evaluation.every={steps}", "evaluation.at_start=" + str(not found).lower()]
        rows = rows_of(train(folder, data, [*overrides, *at, *extra], steps))
        losses = [row["eval/loss"] for row in rows if "eval/loss" in row]
        if not found:
            found.append({"name": "untrained", "eval_loss": losses[0]})
            print(f"{'untrained':<40}{losses[0]:>18.4f}")
        found.append({"name": name, "eval_loss": losses[-1], "steps": steps})
        print(f"{name:<40}{losses[-1]:>18.4f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="All low-memory parts at once.")
    parser.add_argument("--data", type=Path, help="JSONL rows; by default made-up ones")
    parser.add_argument("--steps", type=int, default=4, help="0: no table of memory")
    parser.add_argument("--learn", type=int, default=0, metavar="STEPS")
    parser.add_argument(
        "--arms", nargs="+", choices=ROWS, metavar="NAME", help="of the first table"
    )
    parser.add_argument("--quick", action="store_true", help="three arms, a tiny model, short rows")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    steps, extra = args.steps, []
    if args.quick:
        steps = 3
        extra = ["model={kind: tiny, hidden_size: 128, layers: 4, max_position: 512, dtype: bf16}",
                 "objective.max_length=512"]  # fmt: skip
    base = imports_bytes()
    print(f"imports alone: {base / 2**20:.0f} MiB")
    with tempfile.TemporaryDirectory() as name:
        data = (args.data or _rows(Path(name), 300 if args.quick else 7000)).resolve()
        folder = Path(name) / "runs"
        folder.mkdir()
        names = args.arms or (QUICK if args.quick else ROWS)
        found = memory(folder, data, steps, extra, base, names) if steps else []
        losses = learn(folder, data, args.learn, extra) if args.learn else []
    over = {row["name"]: row["peak_over_imports"] for row in found}
    ratios: dict[str, float] = {}
    if args.learn:
        loss = {row["name"]: row["eval_loss"] for row in losses}
        ratios |= {f"held-out loss, {LAST} vs {n}": loss[LAST] / loss[n] for n in loss if n != LAST}
    if FIRST in over:
        ratios |= {f"{n} vs {FIRST}": over[n] / over[FIRST] for n in over if n != FIRST}
    if LAST in over:
        ratios |= {f"{LAST} vs {n}": over[LAST] / over[n] for n in over if n not in (FIRST, LAST)}
    for key, value in ratios.items():
        print(f"{key}: {value:.3f}")
    if args.json:
        env = {"python": platform.python_version(), "imports_bytes": base, "steps": steps}
        report = {"rows": [*found, *losses], "ratios": ratios, "env": env}
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")


def _rows(folder: Path, characters: int) -> Path:
    path = folder / "rows.jsonl"
    with path.open("w") as file:
        for number in range(60):
            text = " ".join(f"Line {i} of page {number} is about nothing." for i in range(400))
            row = {"prompt": text[:characters] + " Which page?", "completion": f" Page {number}."}
            file.write(json.dumps(row) + "\n")
    return path


if __name__ == "__main__":
    main()
