"""The few lines at the end of a run: what it reached, at what cost, where it lies, what to
do next.
"""

import json
from pathlib import Path
from typing import Any

from mnemic.train.callbacks.console import duration, size
from mnemic.train.recipe.recipe import Recipe


def show(summary: dict[str, Any], recipe: Recipe, console: Any) -> None:
    for line in lines(summary, recipe):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def lines(summary: dict[str, Any], recipe: Recipe) -> list[str]:
    done, total = summary["steps"], summary["total_steps"]
    stopped = f", stopped: {summary['stopped']}" if summary["stopped"] else ""
    found = [f"{recipe.name}: {done} of {total} steps in {duration(summary['seconds'])}{stopped}"]
    first, last = summary["evaluation_first"], summary["evaluation_last"]
    if first and last:
        for key in sorted(k for k in last if k.startswith("eval/")):
            name = "held-out " + key.removeprefix("eval/").replace("_", " ")
            found.append(f"  {name}: {_before(first, last, key)}after {last[key]:.4f}")
    peak = f"  peak memory: {size(summary['host_peak_bytes'])} host"
    if summary["device_peak_bytes"]:
        peak += f", {size(summary['device_peak_bytes'])} device"
    found.append(peak)
    if budget := summary.get("memory_bytes"):
        what = "adapters" if recipe.adapters.kind != "none" else "weights"
        parts = [f"{what if k == 'adapters' else k} {size(v)}" for k, v in budget.items()]
        found.append(f"  memory, all counted: {', '.join(parts)}")
    sample = _last_sample(Path(recipe.folder) / "samples.jsonl")
    if sample:
        found += [
            f"  sample prompt:    {_last_turn(sample['prompt'])}",
            f"  sample answer:    {sample['generated'].strip()}",
            f"  sample reference: {sample['reference'].strip()}",
        ]
    if summary["exported"]:
        found.append(f"  model: {summary['exported']}")
        found.append(f'  try it: mnemic generate {recipe.folder} "..."')
    else:
        found.append("  run the same command again to go on")
    return found


def _before(first: dict[str, Any], last: dict[str, Any], key: str) -> str:
    """The first evaluation, where it is another than the last: `before 0.1, `."""
    step = first.get("step", 0)
    if step and all(first.get(k) == last[k] for k in last):
        return ""
    name = f"at step {step}" if step else "before"
    return f"{name} {first.get(key, float('nan')):.4f}, "


def _last_sample(path: Path) -> dict[str, Any] | None:
    """The first sample of the last evaluation that has an answer other than an empty list."""
    if not path.exists():
        return None
    samples = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    latest = [s for s in samples if s["step"] == samples[-1]["step"]]
    return next((s for s in latest if s["reference"].strip() not in ("", "[]")), latest[0])


def _last_turn(prompt: str) -> str:
    """The user's words in a rendered prompt: the last line that is neither a marker nor empty."""
    turns = [t for t in prompt.replace("<|im_end|>", "\n").splitlines() if t.strip()]
    turns = [t for t in turns if not t.lstrip().startswith("<|")]
    return turns[-1] if turns else prompt
