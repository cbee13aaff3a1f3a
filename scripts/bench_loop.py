"""What our loop costs over a bare PyTorch loop, and what the light commands cost over Python
itself.

    python scripts/bench_loop.py [--quick] [--json FILE]

loop_overhead: both loops run the same work (model, batches, clipping, fused AdamW) in this process,
taking turns in blocks of steps; the ratio is the median over block pairs of our seconds per step
over the bare loop's, at steps of 50 ms and more. Ours includes data, metrics, memory readings and
metrics.jsonl; checkpoints are left out on both sides. help_seconds_over_python,
validate_seconds_over_python: medians of whole processes, minus `python -c pass`.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def light_commands(repeats: int, folder: Path) -> dict[str, float]:
    """Median wall seconds of `--help` and `validate`, over `python -c pass`, processes
    interleaved.
    """
    text = folder / "text.txt"
    text.write_text("some words\n" * 100)
    commands = {
        "python": ["-c", "pass"],
        "help": ["-m", "mnemic.train.cli", "--help"],
        "validate": ["-m", "mnemic.train.cli", "validate", "pretrain_tiny", f"data.path={text}"],
    }
    walls: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(repeats + 1):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, capture_output=True)
            if turn:  # the first turn warms the file cache
                walls[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in walls.items()}
    return {name: median[name] - median["python"] for name in ("help", "validate")}


def loops(blocks: int, block: int, folder: Path) -> dict[str, Any]:
    """Seconds per step of both loops, block by block, and whether their losses are equal."""
    import torch
    import torch.nn.functional as F

    from mnemic.models.tiny import byte_tokenizer, tiny_llama
    from mnemic.train.accelerator import make_accelerator
    from mnemic.train.callbacks.base import Callback
    from mnemic.train.callbacks.memory import MemoryCallback
    from mnemic.train.callbacks.metrics import MetricsFile
    from mnemic.train.data.stream import take
    from mnemic.train.objectives.build import train_stream
    from mnemic.train.objectives.tokens import TokenObjective
    from mnemic.train.recipe.load import build_recipe
    from mnemic.train.trainer import Trainer
    from mnemic.train.update import PlainUpdate

    text = folder / "words.txt"
    text.write_text("".join(f"line {i} of some text to train on\n" for i in range(20_000)))
    recipe = build_recipe(
        {
            "name": "bench",
            "model": {"kind": "tiny", "hidden_size": 128, "layers": 2},
            "data": {"kind": "text", "path": str(text)},
            "objective": {"kind": "lm", "seq_len": 256},
            "optimizer": "adamw",
            "loop": {"steps": 1, "batch_size": 8},
        }
    )
    tokenizer = byte_tokenizer()

    def fresh() -> tuple[Any, Any]:
        model = tiny_llama(tokenizer, hidden_size=128, layers=2, heads=4, max_position=2048, seed=0)
        model.train()
        return model, torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0, fused=True)

    total = blocks * block
    batches = [
        torch.tensor([row.input_ids for row in rows])
        for rows in (take(stream, 8) for stream in [train_stream(recipe, tokenizer).stream] * total)
    ]

    bare_model, bare_optimizer = fresh()
    bare_losses: list[float] = []

    def bare_step() -> None:
        batch = batches[len(bare_losses)]
        logits = bare_model(input_ids=batch, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(
            logits.reshape(-1, logits.shape[-1]).float(), batch[:, 1:].reshape(-1)
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(bare_model.parameters(), 1.0)
        bare_optimizer.step()
        bare_optimizer.zero_grad(set_to_none=True)
        bare_losses.append(loss.item())

    class Turns(Callback):
        """Runs a block of the bare loop after each block of ours, and takes both times."""

        def __init__(self) -> None:
            self.ours: list[float] = []
            self.bare: list[float] = []
            self.losses: list[float] = []

        def on_start(self, trainer: Trainer) -> None:
            self._mark = time.perf_counter()

        def on_row(self, trainer: Trainer, row: dict[str, Any]) -> None:
            self.losses.append(row["loss"])
            if row["step"] % block == 0:
                now = time.perf_counter()
                self.ours.append((now - self._mark) / block)
                for _ in range(block):
                    bare_step()
                self._mark = time.perf_counter()
                self.bare.append((self._mark - now) / block)

    model, optimizer = fresh()
    accelerator = make_accelerator(recipe.loop)
    model, optimizer = accelerator.prepare(model, optimizer)
    streams = train_stream(recipe, tokenizer)
    turns = Turns()
    Trainer(
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        objective=TokenObjective(
            streams.stream,
            batch_size=8,
            micro_batch_size=8,
            pad_id=0,
            packed=False,
            bad=streams.bad,
        ),
        update=PlainUpdate(accelerator, model, optimizer, 1.0),
        lr_at=lambda step: 1.0,
        total_steps=total,
        checkpoints=folder / "checkpoints",
        callbacks=[MemoryCallback(), MetricsFile(folder / "metrics.jsonl"), turns],
        save_every=10**9,
    ).fit()
    # The first block pays for first calls on both sides; the last of ours ends with a checkpoint
    # after its row, which is outside the timed part.
    ratios = [a / b for a, b in zip(turns.ours[1:], turns.bare[1:], strict=True)]
    return {
        "ours_ms": 1e3 * statistics.median(turns.ours[1:]),
        "bare_ms": 1e3 * statistics.median(turns.bare[1:]),
        "ratios": ratios,
        "losses_within": max(
            abs(a - b) / b for a, b in zip(turns.losses, bare_losses, strict=True)
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of the loop and of the light commands.")
    parser.add_argument("--quick", action="store_true", help="under a minute")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as name:
        light = light_commands(3 if args.quick else 9, Path(name))
        found = loops(*((5, 10) if args.quick else (21, 20)), Path(name))
    overhead = statistics.median(found["ratios"]) - 1
    quartiles = statistics.quantiles(found["ratios"], n=4)
    rows = [
        {"name": "bare PyTorch loop", "ms_per_step": found["bare_ms"]},
        {"name": "mnemic loop", "ms_per_step": found["ours_ms"]},
    ]
    print(f"{'':<22}{'ms/step':>9}")
    for row in rows:
        print(f"{row['name']:<22}{row['ms_per_step']:>9.2f}")
    print(
        f"loop_overhead {overhead:+.2%} (quartiles {quartiles[0] - 1:+.2%}, "
        f"{quartiles[2] - 1:+.2%}, {len(found['ratios'])} block pairs; "
        f"losses within {found['losses_within']:.1e})"
    )
    print(f"mnemic --help    {light['help']:.3f} s over python")
    print(f"mnemic validate  {light['validate']:.3f} s over python")
    if args.json:
        import torch

        report = {
            "rows": rows,
            "ratios": {
                "loop_overhead": overhead,
                "help_seconds_over_python": light["help"],
                "validate_seconds_over_python": light["validate"],
            },
            "env": {
                "torch": torch.__version__,
                "python": platform.python_version(),
                "threads": torch.get_num_threads(),
                "machine": platform.machine(),
            },
        }
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
