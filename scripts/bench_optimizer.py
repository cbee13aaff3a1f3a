"""Time and state of an optimizer step on the matrices of a Llama of 130 M parameters.

    python scripts/bench_optimizer.py [--quick] [--all] [--json FILE]

Seven layers of 4 x (768, 768), 2 x (2048, 768) and (768, 2048): 49 tensors, 49.55 M parameters. All
optimizers live in one process with one thread, see the same gradients and take turns, one step a
round, each on weights of its own; no weight decay anywhere. Times are the process's CPU time: with
one thread that is the wall's, less what other processes take. The first step (states, projection or
SVD, compilation) is apart, in wall time. `vs fused` is the median over rounds of the time over that
of fused AdamW in the same round; the ratios are of the least times over rounds. State is every byte
of storage held between steps, projections included (GaLore's in fp32 is a view of all of the SVD's
U or V). Passes: `mnemic.optim.passes`, for the rows it can see into.

mini_vs_fused_bf16 compares equal rounding, to nearest, which is all that fused AdamW has;
mini_sr_vs_fused_bf16 is our default, stochastic rounding. Ratios of APOLLO at rank 192 are of the
Gaussian projection, kept between steps as apollo-torch keeps it, unless they say sparse.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

SHAPES = [(768, 768)] * 4 + [(2048, 768)] * 2 + [(768, 2048)]
RANK = 192
# So small that weights stay what they are, however many rounds.
LR = 1e-7
LOW = {"update_proj_gap": 200, "proj": "random", "proj_type": "std"}
PEERS = ("apollo-torch", "galore-torch", "bitsandbytes", "torchao")
Make = Callable[[list[Any]], Any]


@dataclass
class Row:
    """One optimizer: how it is made, and what was measured."""

    name: str
    make: Make
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    # Whether the counter sees its work: torch operators, nothing compiled, no kernels of its own.
    countable: bool = True
    quick: bool = True
    only_all: bool = False
    times: list[float] = field(default_factory=list)
    first: float = 0.0
    state: int = 0
    passes: float | None = None

    def least(self) -> float:
        return min(self.times)


def contestants() -> list[Row]:
    import torch

    from mnemic.optim.apollo import Apollo, ApolloMini

    def apollo_torch(**group: Any) -> Make:
        def make(params: list[Any]) -> Any:
            from apollo_torch import APOLLOAdamW

            return APOLLOAdamW([{"params": params, **group, **LOW}], lr=LR)

        return make

    def galore(params: list[Any]) -> Any:
        from galore_torch import GaLoreAdamW

        group = {"rank": RANK, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
        return GaLoreAdamW([{"params": params, **group}], lr=LR, no_deprecation_warning=True)

    def bnb(params: list[Any]) -> Any:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(params, lr=LR, weight_decay=0.0)

    def torchao(params: list[Any]) -> Any:
        from torchao.optim import AdamW8bit

        return AdamW8bit(params, lr=LR, weight_decay=0.0)

    def adamw(**how: bool) -> Make:
        return lambda params: torch.optim.AdamW(params, lr=LR, weight_decay=0.0, **how)

    def mini(**settings: Any) -> Make:
        return lambda params: ApolloMini(params, LR, **settings)

    def apollo(**settings: Any) -> Make:
        return lambda params: Apollo(params, LR, rank=RANK, **settings)

    rows = [
        Row("SGD fused", lambda params: torch.optim.SGD(params, lr=LR, fused=True)),
        Row("AdamW fused", adamw(fused=True)),
        Row("AdamW foreach", adamw(foreach=True)),
        Row("apollo-torch APOLLO", apollo_torch(rank=RANK, scale=1, scale_type="channel")),
        Row("apollo-torch Mini", apollo_torch(rank=1, scale=128, scale_type="tensor")),
        Row("GaLoreAdamW", galore),
        Row("bitsandbytes AdamW8bit", bnb, countable=False),
        Row("torchao AdamW8bit", torchao, countable=False, quick=False),
        Row("mnemic Mini", mini()),
        Row("mnemic Mini, nearest", mini(rounding="nearest"), dtypes=("bf16",)),
        Row("mnemic Mini, compiled", mini(compile=True), countable=False),
        Row("mnemic APOLLO", apollo(proj="gaussian")),
        Row("mnemic APOLLO, cached P", apollo(proj="gaussian", cache_projection=True)),
        Row("mnemic APOLLO sparse", apollo()),
        Row("mnemic APOLLO sparse, compiled", apollo(compile=True), countable=False, quick=False),
    ]
    if hasattr(torch.optim, "Muon"):
        muon = torch.optim.Muon
        rows.append(Row("Muon", lambda ps: muon(ps, lr=LR, weight_decay=0.0), only_all=True))
    return rows


def _tensors(value: Any, seen: set[int]) -> Iterator[Any]:
    """Plain tensors inside dicts, lists, tensor subclasses and objects of the peers."""
    import torch

    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        if not hasattr(value, "__tensor_flatten__"):
            yield value
            return
        inside: Any = [getattr(value, name) for name in value.__tensor_flatten__()[0]]
    elif isinstance(value, dict):
        inside = value.values()
    elif isinstance(value, (list, tuple)):
        inside = value
    else:
        inside = getattr(value, "__dict__", {}).values()
    for one in inside:
        yield from _tensors(one, seen)


def held_bytes(optimizer: Any) -> int:
    """Bytes that `optimizer` keeps between steps, weights and gradients apart."""
    seen: set[int] = set()
    held = [list(optimizer.state.values()), getattr(optimizer, "_projections", {})]
    storages = {}
    for x in _tensors(held, seen):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
    return sum(storages.values())


def measure(rows: list[Row], dtype_name: str, layers: int, rounds: int) -> list[Row]:
    """Fill in `rows`; those whose library is missing are left out, with a line."""
    import torch

    from mnemic.optim.passes import count_passes

    # Each dtype compiles afresh: torch allows few variants of one function in a process.
    torch._dynamo.reset()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype_name]
    draw = torch.Generator().manual_seed(0)
    shapes = SHAPES * layers
    start = [torch.randn(s, generator=draw).mul_(0.02).to(dtype) for s in shapes]
    grads = [torch.randn(s, generator=draw).mul_(1e-3).to(dtype) for s in shapes]
    pristine = [g.clone() for g in grads]

    running: list[tuple[Row, Any, list[Any]]] = []
    spoils: set[str] = set()

    def step(
        row: Row, optimizer: Any, params: list[Any], clock: Callable[[], float] = time.process_time
    ) -> float:
        # Some drop or replace p.grad, some write into it: neither is on another's clock.
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        began = clock()
        optimizer.step()
        took = clock() - began
        if row.name in spoils:
            for grad, clean in zip(grads, pristine, strict=True):
                grad.copy_(clean)
        return took

    for row in rows:
        params = [torch.nn.Parameter(w.clone()) for w in start]
        try:
            optimizer = row.make(params)
        except ImportError as error:
            print(f"{row.name}: left out, {error}; it comes with the extra `bench`")
            continue
        spoils.add(row.name)
        row.first = step(row, optimizer, params, time.perf_counter)
        row.state = held_bytes(optimizer)
        for param, grad in zip(params, pristine, strict=True):
            param.grad = grad.clone()
        given = [param.grad for param in params]
        if row.countable:
            row.passes = count_passes(optimizer.step, params)
        else:
            optimizer.step()
        if all(torch.equal(a, b) for a, b in zip(given, pristine, strict=True)):
            spoils.discard(row.name)
        for param in params:
            param.grad = None
        running.append((row, optimizer, params))
    gc.collect()
    for _ in range(rounds):
        for row, optimizer, params in running:
            row.times.append(step(row, optimizer, params))
    for row, _, params in running:
        if not all(bool(p.isfinite().all()) for p in params):
            raise RuntimeError(f"{row.name}: weights are no longer finite, its time means nothing")
    if spoils:
        print(f"{dtype_name}: gradients restored, off the clock, after {', '.join(sorted(spoils))}")
    return [row for row, _, _ in running]


def show(rows: list[Row], dtype_name: str, parameters: int) -> list[dict[str, Any]]:
    fused = next(row for row in rows if row.name == "AdamW fused")
    print(
        f"\n{dtype_name + ' weights and gradients':<32}{'state MB':>9}{'B/param':>9}{'min ms':>9}"
        f"{'median ms':>10}{'vs fused':>9}{'passes':>8}{'first ms':>10}"
    )
    found = []
    for row in rows:
        relative = statistics.median(a / b for a, b in zip(row.times, fused.times, strict=True))
        median = statistics.median(row.times)
        passes = "-" if row.passes is None else f"{row.passes:.2f}"
        print(
            f"{row.name:<32}{row.state / 1e6:>9.2f}{row.state / parameters:>9.4f}"
            f"{1e3 * row.least():>9.1f}{1e3 * median:>10.1f}{relative:>9.2f}{passes:>8}"
            f"{1e3 * row.first:>10.0f}"
        )
        found.append(
            {
                "name": row.name,
                "dtype": dtype_name,
                "state_bytes": row.state,
                "min_ms": 1e3 * row.least(),
                "median_ms": 1e3 * median,
                "median_vs_fused": relative,
                "passes": row.passes,
                "first_ms": 1e3 * row.first,
            }
        )
    return found


def ratios_of(tables: dict[str, list[Row]]) -> dict[str, float]:
    """The ratios, as far as their peers are installed."""
    fp32, bf16 = ({row.name: row for row in tables[name]} for name in ("fp32", "bf16"))
    pairs = {
        "mini_vs_fused_fp32": (fp32, "mnemic Mini", "AdamW fused"),
        "mini_vs_fused_bf16": (bf16, "mnemic Mini, nearest", "AdamW fused"),
        "mini_sr_vs_fused_bf16": (bf16, "mnemic Mini", "AdamW fused"),
        "mini_vs_apollo_torch": (fp32, "mnemic Mini", "apollo-torch Mini"),
        "apollo_vs_apollo_torch": (fp32, "mnemic APOLLO, cached P", "apollo-torch APOLLO"),
        "apollo_sparse_vs_apollo_torch": (fp32, "mnemic APOLLO sparse", "apollo-torch APOLLO"),
    }
    ratios = {
        key: table[ours].least() / table[theirs].least()
        for key, (table, ours, theirs) in pairs.items()
        if theirs in table
    }
    counted = {
        "mini_passes": "mnemic Mini",
        "apollo_passes": "mnemic APOLLO, cached P",
        "apollo_sparse_passes": "mnemic APOLLO sparse",
    }
    return ratios | {key: fp32[name].passes or 0.0 for key, name in counted.items()}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and state of an optimizer step.")
    parser.add_argument("--quick", action="store_true", help="one layer, under a minute")
    parser.add_argument("--all", action="store_true", help="Muon as well: 5 seconds a step")
    parser.add_argument("--rounds", type=int, help="steps of each optimizer that are timed")
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    torch.set_num_threads(1)
    layers, rounds = (1, 3) if args.quick else (7, 15)
    rounds = args.rounds or rounds
    parameters = layers * sum(a * b for a, b in SHAPES)
    tables: dict[str, list[Row]] = {}
    found: list[dict[str, Any]] = []
    for dtype_name in ("fp32", "bf16"):
        rows = [
            row
            for row in contestants()
            if dtype_name in row.dtypes
            and (row.quick or not args.quick)
            and (args.all or not row.only_all)
        ]
        tables[dtype_name] = measure(rows, dtype_name, layers, rounds)
        found += show(tables[dtype_name], dtype_name, parameters)
        gc.collect()
    ratios = ratios_of(tables)
    print("\nleast times over rounds, fp32 unless named; below 1 is faster than the peer")
    for key, value in ratios.items():
        print(f"{key:<32}{value:>8.3f}")
    if args.json:
        env = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
            "parameters": parameters,
            "rounds": rounds,
            "peers": {name: _version(name) for name in PEERS},
        }
        report = {"rows": found, "ratios": ratios, "env": env}
        Path(args.json).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
