"""Episodes per second of GRPO on a memory environment (rollout, rewards, update): ours beside TRL's
GRPOTrainer with `environment_factory`.

    python scripts/bench_rollout.py [--json FILE] [--repeats 2] [--quick]

Equal in `trl` and `mnemic`: the model (a Llama of 0.65 M parameters, fp32, from one folder), the
episodes (kvstream, 4 chunks) and how many of them a step plays (8 groups of 8) and a backward holds
(16), the tokens generated for a chunk (forced, see rollout_worker.py) and so the contents of the
memories, fused AdamW, rate, clipping, dapo loss without KL, no gradient checkpointing. Both arms
pay for sampling, though what they sample is overwritten.

Not equal, because it is what the two do: TRL appends each chunk to one growing context and encodes
all of it anew at every turn, ours begins each chunk in a fresh context with a view of the memory;
TRL needs a `next_chunk` call, whose tokens ours writes as filler, and a closing turn, forced to be
its end token alone; TRL computes entropies for its log; ours has rewards by turn and searches the
memory for each view. TRL trains one row an episode, ours one a chunk. `mnemic lines` writes the
same operations in the syntax of our tiny recipes, at its own length: what the syntax saves.

With `bare` prompts nobody is told of the tools, as suits a model trained from nothing; `chat` puts
instructions and tool schemas in front, in TRL once an episode, in ours once a chunk.

Seconds are of one CPU core, so that another process on the machine is not in them: medians over the
steps after the first of all repeats, arms taking turns. Tokens are per episode: generated; encoded
as prompts at the beginning of turns; trained; and all of the rows trained on. Peak is resident
bytes over those after imports. Ratios without a suffix are of bare prompts.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("rollout_worker.py")
# malloc stays as it is: settings that give back what is freed cost time in both arms.
ENV = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
ARMS = ["trl", "mnemic", "mnemic lines"]
TOKENS = ["generated", "prefilled", "trained", "updated"]


def work(arm: str, folder: Path, *more: str) -> str:
    """The last line that a worker prints."""
    done = subprocess.run(
        [sys.executable, str(WORKER), arm, "--model", str(folder / "model"),
         "--work", str(folder / "work"), *more],
        capture_output=True, text=True, env={**os.environ, **ENV},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{arm}:\n{done.stderr[-3000:]}")
    return (done.stdout.splitlines() or [""])[-1]


def merge(name: str, prompts: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """A row from the repeats of one arm."""
    step = statistics.median(s for run in runs for s in run["seconds_per_step"])
    rollout = statistics.median(s for run in runs for s in run["rollout_seconds"])
    first = runs[0]
    return {
        "name": name, "prompts": prompts, "episodes_per_second": first["episodes_per_step"] / step,
        "step_seconds": step, "rollout_seconds": rollout, "update_seconds": step - rollout,
        "peak_bytes": statistics.median(run["peak_bytes"] for run in runs),
        **{f"{key}_tokens": first[f"{key}_tokens_per_episode"] for key in TOKENS},
        "generated_tokens_per_second":
            first["generated_tokens_per_episode"] * first["episodes_per_step"] / step,
        "reward_correct": first["reward_correct"], "parameters": first["parameters"],
    }  # fmt: skip


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['name']:<14}{row['prompts']:<6}{row['episodes_per_second']:>9.2f}"
        f"{row['step_seconds']:>8.2f}{row['rollout_seconds']:>9.2f}{row['update_seconds']:>8.2f}"
        + "".join(f"{row[f'{key}_tokens']:>10.0f}" for key in TOKENS)
        + f"{row['reward_correct']:>7.2f}{row['peak_bytes'] / 2**20:>7.0f}",
        flush=True,
    )


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Ours over TRL's."""
    found: dict[str, float] = {}
    by = {(row["name"], row["prompts"]): row for row in rows}
    for prompts, suffix in (("bare", ""), ("chat", "_chat")):
        peer, own = by.get(("trl", prompts)), by.get(("mnemic", prompts))
        if peer and own:
            for key, figure in (
                ("episodes_per_second_vs_trl", "episodes_per_second"),
                ("generated_tokens_per_second_vs_trl", "generated_tokens_per_second"),
                ("peak_rss_vs_trl", "peak_bytes"),
            ):
                found[key + suffix] = own[figure] / peer[figure]
        if peer and (lines := by.get(("mnemic lines", prompts))):
            rate = lines["episodes_per_second"] / peer["episodes_per_second"]
            found[f"lines_episodes_per_second_vs_trl{suffix}"] = rate
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="GRPO episodes per second beside TRL.")
    parser.add_argument("--prompts", nargs="+", choices=["bare", "chat"], default=["bare", "chat"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--steps", type=int, default=4, help="of a repeat; the first is left out")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="two arms, 16 episodes a step")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    more = ["--steps", str(args.steps)]
    if args.quick:
        args.prompts, args.arms, args.repeats = ["bare"], ["trl", "mnemic"], 1
        more = ["--steps", "3", "--groups", "2"]
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        work("build", folder)
        print(f"{'':<20}{'episodes':>9}{'':>25}   tokens an episode\n{'':<20}{'a second':>9}"
              f"{'step s':>8}{'rollout':>9}{'update':>8}"
              + "".join(f"{key:>10}" for key in TOKENS) + f"{'r1':>7}{'MiB':>7}")  # fmt: skip
        for prompts in args.prompts:
            runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in args.arms}
            for _ in range(args.repeats):
                for arm in args.arms:
                    runs[arm].append(json.loads(work(arm, folder, "--prompts", prompts, *more)))
            for arm in args.arms:
                rows.append(merge(arm, prompts, runs[arm]))
                show(rows[-1])
    found = ratios(rows)
    print("\n" + "\n".join(f"{key:<40}{value:.2f}" for key, value in found.items()))
    if args.json:
        import platform

        env = {key: version(key) for key in ("torch", "transformers", "trl")}
        env |= {"machine": platform.processor() or platform.machine(), "threads": 1}
        text = json.dumps({"rows": rows, "ratios": found, "env": env}, indent=1)
        Path(args.json).write_text(text)


if __name__ == "__main__":
    main()
