"""Held-out loss of low-memory optimizers beside AdamW's, each at its best learning rate.

    python scripts/bench_quality.py --data wikitext2_valid.txt tinyshakespeare.txt --runs runs.jsonl

A byte-level Llama of 2.2 M parameters is trained from scratch on the first nine tenths of each text
and measured on the last tenth, for every method, learning rate and seed. All methods see the same
weights, batches, schedule (10 % warm-up, cosine to 10 %), betas and no weight decay, and the same
sweep of rates; where the best rate is at an edge, the sweep of that method goes on until it is not.
The low-rank rules have the matrices, AdamW the embedding (tied) and the norms, as in the papers.

Each finished run is a line of --runs, and is not run again: the benchmark can be stopped and goes
on. Ratios: apollo_vs_adamw_loss (the best of APOLLO's variants at rank 1/4), mini_vs_adamw_loss,
means over seeds at the best rate, and over texts. GaLore needs the extra `bench`.
"""

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
METHODS = (
    "adamw", "apollo sparse 1/4", "apollo gaussian 1/4", "apollo-mini",
    "apollo sparse 1/8", "apollo gaussian 1/8", "galore 1/4",
)  # fmt: skip
BETAS = (0.9, 0.99)


def build_optimizer(method: str, model: Any, lr: float) -> Any:
    import torch

    from mnemic.optim.apollo import Apollo, ApolloMini
    from mnemic.optim.select import apollo_groups, roles

    name, *options = method.split()
    if name == "adamw":
        return torch.optim.AdamW(
            model.parameters(), lr=lr, betas=BETAS, weight_decay=0.0, fused=True
        )
    if name == "apollo":
        return Apollo(
            apollo_groups(model), lr, betas=BETAS, proj=options[0], rank=_share(options[1])
        )
    if name == "apollo-mini":
        return ApolloMini(apollo_groups(model), lr, betas=BETAS)
    from galore_torch import GaLoreAdamW

    found, params = roles(model), dict(model.named_parameters())
    rank = round(_share(options[0]) * model.config.hidden_size)
    low = [params[n] for n, role in found.items() if role == "matrix"]
    rest = [params[n] for n, role in found.items() if role != "matrix"]
    # Its authors' settings for pre-training: scale 0.25, a new subspace every 200 steps.
    galore = {"rank": rank, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    groups = [{"params": low, **galore}, {"params": rest}]
    return GaLoreAdamW(groups, lr=lr, betas=BETAS, weight_decay=0.0, no_deprecation_warning=True)


def _share(text: str) -> float:
    top, bottom = text.split("/")
    return int(top) / int(bottom)


def state_bytes(optimizer: Any) -> int:
    """Bytes of every tensor in the state, GaLore's projection matrix included."""
    import torch

    def size(value: Any) -> int:
        if isinstance(value, torch.Tensor):
            return value.numel() * value.element_size()
        return sum(map(size, vars(value).values())) if hasattr(value, "ortho_matrix") else 0

    return sum(size(v) for state in optimizer.state.values() for v in state.values())


def one_run(
    text: bytes, method: str, lr: float, seed: int, *, steps: int, hidden: int, layers: int,
    batch: int = 8, length: int = 128, eval_rows: int = 128,
) -> dict[str, Any]:  # fmt: skip
    """Train once; the held-out loss in nats a byte, averaged over the whole last part of training's
    held-out rows, and what it cost.
    """
    import torch
    import torch.nn.functional as F

    from mnemic.models.tiny import byte_tokenizer, tiny_llama
    from mnemic.optim.schedules import lr_factor

    cut = len(text) * 9 // 10
    train = torch.frombuffer(bytearray(text[:cut]), dtype=torch.uint8).long()
    held = torch.frombuffer(bytearray(text[cut:]), dtype=torch.uint8).long()
    model = tiny_llama(
        byte_tokenizer(), hidden_size=hidden, layers=layers, heads=4, max_position=length, seed=seed
    )
    optimizer = build_optimizer(method, model, lr)
    generator = torch.Generator().manual_seed(seed)
    window = torch.arange(length)

    def loss_of(rows: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=rows, use_cache=False).logits
        return F.cross_entropy(
            logits[:, :-1].float().reshape(-1, logits.shape[-1]), rows[:, 1:].reshape(-1)
        )

    update_seconds, began = 0.0, time.perf_counter()
    for step in range(steps):
        factor = lr_factor(step, steps, kind="cosine", warmup=0.1, min_ratio=0.1)
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
        starts = torch.randint(len(train) - length, (batch, 1), generator=generator)
        loss = loss_of(train[starts + window])
        if not math.isfinite(loss.item()):
            break
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        mark = time.perf_counter()
        optimizer.step()
        update_seconds += time.perf_counter() - mark
        optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - began
    with torch.no_grad():
        starts = torch.linspace(0, len(held) - length - 1, eval_rows).long()[:, None]
        rows = held[starts + window]
        final = statistics.mean(loss_of(part).item() for part in rows.split(16))
    return {
        "loss": final if math.isfinite(final) else None,
        "seconds": seconds,
        "update_ms": 1e3 * update_seconds / steps,
        "state_bytes": state_bytes(optimizer),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


class Runs:
    """Finished runs by (text, method, rate, seed), in a file that outlives this process."""

    def __init__(self, path: Path, run: Callable[..., dict[str, Any]], settings: Any) -> None:
        self.path, self.run, self.settings = path, run, settings
        self.done: dict[Any, dict[str, Any]] = {}
        for line in path.read_text().splitlines() if path.exists() else []:
            row = json.loads(line)
            if row["settings"] == settings:
                self.done[self._key(row)] = row

    @staticmethod
    def _key(row: dict[str, Any]) -> Any:
        return row["text"], row["method"], f"{row['lr']:.3g}", row["seed"]

    def get(self, text: Path, method: str, lr: float, seed: int) -> dict[str, Any]:
        row = {"text": text.stem, "method": method, "lr": lr, "seed": seed}
        key = self._key(row)
        if key not in self.done:
            row |= self.run(text.read_bytes(), method, lr, seed, **self.settings)
            row["settings"] = self.settings
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            self.done[key] = row
            shown = "diverged" if row["loss"] is None else f"{row['loss']:.4f}"
            print(f"  {text.stem:<18}{method:<21} lr {lr:<8.3g}seed {seed}  {shown}", flush=True)
        return self.done[key]


def sweep(runs: Runs, text: Path, method: str, rates: tuple[float, ...], seeds: int) -> Any:
    """Losses by rate and seed. The first seed finds the range; the others run all rates of it."""
    found = {lr: [runs.get(text, method, lr, 0)] for lr in rates}
    for _ in range(3):
        best, low, high = _best(found), min(found), max(found)
        edge = low / 2 if best == low else high * 2 if best == high else None
        if edge is None or len(rates) == 1:
            break
        found[edge] = [runs.get(text, method, edge, 0)]
    yield found
    for seed in range(1, seeds):
        for lr in found:
            found[lr].append(runs.get(text, method, lr, seed))
        yield found


def _mean(rows: list[dict[str, Any]]) -> float:
    losses = [row["loss"] for row in rows]
    return math.inf if None in losses else statistics.mean(losses)


def _best(found: dict[float, list[dict[str, Any]]]) -> float:
    return min(found, key=lambda lr: _mean(found[lr]))


def interleaved(sweeps: dict[Any, Iterator[Any]]) -> dict[Any, Any]:
    """Every method's first seed before any method's second: a stopped benchmark compares all."""
    latest: dict[Any, Any] = {}
    while sweeps:
        for key in list(sweeps):
            found = next(sweeps[key], None)
            if found is None:
                del sweeps[key]
            else:
                latest[key] = found
    return latest


def main() -> None:
    parser = argparse.ArgumentParser(description="Held-out loss of low-memory optimizers.")
    parser.add_argument("--data", nargs="+", required=True, type=Path, help="text files")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--runs", type=Path, default=Path("bench_quality_runs.jsonl"))
    parser.add_argument("--quick", action="store_true", help="a tiny model, one rate, one seed")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    settings = {"steps": args.steps, "hidden": 256, "layers": 3}
    rates, seeds = tuple(args.rates), args.seeds
    methods = [m for m in args.methods if m != "galore 1/4" or _has_galore()]
    if args.quick:
        settings, rates, seeds = {"steps": 20, "hidden": 64, "layers": 1}, (4e-3,), 1
    runs = Runs(args.runs, one_run, settings)
    found = interleaved(
        {(t, m): sweep(runs, t, m, rates, seeds) for t in args.data for m in methods}
    )

    rows, means = [], {}
    print(f"\n{'':<40}{'best lr':>9}{'held-out':>10}{'std':>8}{'state MB':>10}{'update ms':>11}")
    for (text, method), by_rate in found.items():
        best = _best(by_rate)
        losses = [r["loss"] for r in by_rate[best]]
        mean = _mean(by_rate[best])
        means[text, method] = mean
        row = {
            "name": f"{text.stem}: {method}",
            "best_lr": best,
            "loss": mean,
            "std": statistics.stdev(losses) if len(losses) > 1 and None not in losses else None,
            "seeds": len(losses),
            "state_bytes": by_rate[best][0]["state_bytes"],
            "update_ms": statistics.median(r["update_ms"] for r in by_rate[best]),
            "by_rate": {f"{lr:g}": _mean(by_rate[lr]) for lr in sorted(by_rate)},
        }
        rows.append(row)
        print(
            f"{row['name']:<40}{best:>9.2g}{mean:>10.4f}{row['std'] or 0:>8.4f}"
            f"{row['state_bytes'] / 1e6:>10.3f}{row['update_ms']:>11.1f}"
        )

    def ratio(names: list[str]) -> float | None:
        names = [n for n in names if n in methods]
        if not names or "adamw" not in methods:
            return None
        return statistics.mean(
            min(means[t, n] for n in names) / means[t, "adamw"] for t in args.data
        )

    ratios = {
        "apollo_vs_adamw_loss": ratio(["apollo sparse 1/4", "apollo gaussian 1/4"]),
        "apollo_sparse_vs_adamw_loss": ratio(["apollo sparse 1/4"]),
        "mini_vs_adamw_loss": ratio(["apollo-mini"]),
    }
    for key, value in ratios.items():
        print(f"{key} {value:.4f}" if value else f"{key} not run")
    if args.json:
        env = {"torch": torch.__version__, "python": platform.python_version(), **settings}
        report = {"rows": rows, "ratios": ratios, "env": env}
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")


def _has_galore() -> bool:
    from importlib.util import find_spec

    if find_spec("galore_torch") is None:
        print("galore is left out: it comes with the extra `bench`")
        return False
    return True


if __name__ == "__main__":
    main()
