"""`mnemic plan` against runs: the peak of the whole process that the plan foretells, and the one
that was met, for every shipped recipe that runs on a CPU.

    python scripts/bench_plan.py --text FILE --rows ROWS.jsonl [--only NAME,...] [--json FILE]

Each recipe is planned and then trained for a few steps in a process of its own, evaluation and
export included where it has one (of few rows: their number changes nothing of the peak). `--text`:
any text; `--rows`: long rows with short answers, as scripts/long_rows.py makes them.
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

TEXT, ROWS = "data.path={text}", "data.path={rows}"
SHORT = ["loop.steps=6", "evaluation.every=6", "evaluation.max_rows=4"]
GENERATED = ["loop.steps=6", "evaluation.every=6", "evaluation.data.size={batch}"]
RECIPES: dict[str, list[str]] = {
    "quickstart": GENERATED,
    "pretrain_tiny": [TEXT, *SHORT],
    "pretrain_apollo": [TEXT, *SHORT],
    "finetune_apollo_mini": [TEXT, *SHORT],
    "lowmem_full": [TEXT, *SHORT],
    "lowmem_long": [ROWS, *SHORT],
    "lowmem_lora": GENERATED,
    "long_context_exact": [ROWS, "loop.steps=3", "evaluation.every=3", "evaluation.max_rows=2"],
    "long_context_sparse": [
        ROWS, "loop.steps=3", "evaluation.every=3", "evaluation.max_rows=2",
        "tokens.probe_every=null",
    ],
    "memory_sft_tiny": ["loop.steps=20", "evaluation.every=20", "evaluation.play=2"],
    "memory_grpo_tiny": ["loop.steps=2", "evaluation.every=2", "evaluation.data.size=4"],
    # As many as it takes until turns end like a teacher's, which the plan of grpo expects.
    "memory_sft_smollm2": ["loop.steps=40", "evaluation.every=40", "evaluation.data.size=4",
                           "evaluation.play=1"],
    "memory_grpo_smollm2": ["loop.steps=1", "evaluation.every=1", "evaluation.data.size=1"],
    "memlora_extract": GENERATED,
    "memlora_update": GENERATED,
    "memlora_generate": GENERATED,
    "memlora_all": GENERATED,
}  # fmt: skip
WARM = {"memory_grpo_tiny": "memory_sft_tiny", "memory_grpo_smollm2": "memory_sft_smollm2"}
"""What a recipe begins from."""
QUICK = "memory_sft_tiny"


def mnemic(*args: str, cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "mnemic.train.cli", *args], cwd=cwd, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"mnemic {' '.join(args)}: {done.stderr.strip()[-500:]}")
    return done.stdout


def measure(name: str, overrides: list[str], cwd: Path) -> dict[str, Any]:
    """Bytes foretold and met."""
    plan = json.loads(mnemic("plan", name, *overrides, "--json", cwd=cwd))
    (way,) = [way for way in plan["ways"] if way["chosen"]]
    mnemic("train", name, *overrides, cwd=cwd)
    summary = json.loads((cwd / "runs" / name / "summary.json").read_text())
    planned, met = sum(way["host"].values()), summary["host_peak_bytes"]
    return {
        "name": name, "planned": planned, "measured": met, "error": planned / met - 1,
        "most_in": way["peak"], "host": way["host"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Planned and measured peaks of all recipes.")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(RECIPES))
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} alone, which needs no file")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.quick:
        args.only = [QUICK]
    unknown = [name for name in args.only if name not in RECIPES]
    if unknown:
        parser.error(f"--only: {', '.join(unknown)} not among {', '.join(RECIPES)}")
    values = {"batch": "32"}
    for option, key in (("text", TEXT), ("rows", ROWS)):
        path, needed = getattr(args, option), [n for n in args.only if key in RECIPES[n]]
        if path is not None:
            values[option] = str(path.resolve())
        elif needed:
            parser.error(f"--{option} FILE is what {', '.join(needed)} would train on")
    found: list[dict[str, Any]] = []
    print("| recipe | planned, MiB | measured | |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name in args.only:
            overrides = [item.format(**values) for item in RECIPES[name]]
            before = WARM.get(name)
            try:
                if before is not None and not (work / "runs" / before).is_dir():
                    mnemic("train", before, *RECIPES[before], cwd=work)
                if name == "memory_grpo_smollm2":
                    warm = f"runs/{before}"
                    mnemic("export", warm, f"{warm}/merged", "--merge", cwd=work)
                row = measure(name, overrides, work)
            except RuntimeError as error:
                found.append({"name": name, "failed": str(error)})
                print(f"| `{name}` | failed: {error} |", flush=True)
                continue
            found.append(row)
            print(
                f"| `{name}` | {row['planned'] / 2**20:,.0f} | {row['measured'] / 2**20:,.0f} | "
                f"{row['error']:+.1%} |", flush=True,
            )  # fmt: skip
    known = [row for row in found if "error" in row]
    within = sum(abs(row["error"]) <= 0.1 for row in known)
    print(f"\nwithin 10 %: {within} of {len(found)}")
    if args.json:
        ratios = {row["name"]: row["planned"] / row["measured"] for row in known}
        report = {"rows": found, "ratios": ratios, "env": {"python": platform.python_version()}}
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")
    raise SystemExit(0 if within == len(found) else 1)


if __name__ == "__main__":
    main()
