"""One of our arms of `bench_offload.py`, in a fresh process: the streamed engine over a checkpoint.

Same arguments and the same closing JSON line as `deepspeed_worker.py`. Arms: ours_adamw (bf16
weights, fp32 master and moments), ours_bf16, ours_8bit (moments), ours_mini (APOLLO-Mini for every
matrix, embedding and head included, so that nothing but weights moves; at a third of the rate,
since without a warm-up its one scale a matrix overshoots at AdamW's).
"""

import argparse
import json
import resource
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from transformers.models.llama import modeling_llama

from mnemic.optim.apollo import Apollo
from mnemic.optim.groups import decay_groups
from mnemic.optim.select import apollo_groups
from mnemic.train.callbacks.memory import host_peak_bytes, reset_host_peak
from mnemic.train.data.collate import collate
from mnemic.train.data.tokenize import Example
from mnemic.train.objectives.tokens import TokenObjective
from mnemic.train.offload.engine import Engine, Settings, lay_out
from mnemic.train.offload.io import Trace
from mnemic.train.offload.memory import settle_malloc
from mnemic.train.offload.skeleton import dissect, without_weights
from mnemic.train.offload.transfer import read_safetensors, safetensors_of
from mnemic.train.offload.update import StreamedUpdate

STATES = {"ours_adamw": "fp32", "ours_bf16": "bf16", "ours_8bit": "8bit", "ours_mini": "fp32"}


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(("VmRSS:",)):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmRSS")


def disk_counters() -> tuple[int, int]:
    """Bytes this process has had read from and written to block devices."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"]), int(fields["write_bytes"])


class Rows(TokenObjective):
    """One row of given token ids a step."""

    def __init__(self, ids: Any) -> None:
        self.ids = ids

    def microbatches(self, step: int) -> list[Any]:
        row = [int(token) for token in self.ids[step - 1]]
        example = Example(row, [-100, *row[1:]], (len(row),), len(row))
        return [collate([example], pad_id=0, packed=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", choices=STATES, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ids", type=Path, required=True)
    parser.add_argument("--ram-budget", type=int)
    parser.add_argument("--timeline", type=Path, help="write who was busy when, as JSON")
    args = parser.parse_args()
    settle_malloc()
    assert modeling_llama  # imported here, so that it counts as an import
    imports = resident_bytes()
    began = time.perf_counter()
    ids = [row[: args.tokens] for row in json.loads(args.ids.read_text())]
    trace = Trace() if args.timeline else None
    update, engine = build(args, trace)
    init = time.perf_counter() - began
    reset_host_peak()
    objective = Rows(ids)
    losses, seconds, read, written = [], [], [], []
    for step in range(args.steps):
        before, start = disk_counters(), time.perf_counter()
        torch.manual_seed(args.seed + step)
        batches = objective.microbatches(step + 1)
        weight = sum(batch.weight for batch in batches)
        state = SimpleNamespace(step=step, objective=objective)
        loss, _ = update.run(state, batches, 1 / weight)
        update.finish(step + 1)
        engine.store.commit(step + 1, {"step": step + 1})
        seconds.append(time.perf_counter() - start)
        after = disk_counters()
        losses.append(float(loss) / weight)
        read.append(after[0] - before[0])
        written.append(after[1] - before[1])
    disk = sum(p.stat().st_blocks * 512 for p in args.work.rglob("*") if p.is_file())
    if trace is not None:
        lanes = ("lane", "name", "start", "end", "bytes")
        args.timeline.write_text(
            json.dumps([dict(zip(lanes, row, strict=True)) for row in trace.rows])
        )
    result = {
        "losses": losses, "step_seconds": seconds, "rss_after_imports": imports,
        "peak_rss": max(
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, host_peak_bytes()
        ),
        "step_peak_rss": host_peak_bytes(),
        "read_bytes_per_step": read, "written_bytes_per_step": written, "disk_bytes": disk,
        "init_seconds": init, "resident": engine.layout.resident(),
        "hits": engine.layers.hits, "misses": engine.layers.misses,
    }  # fmt: skip
    engine.close()
    print(json.dumps(result))


def build(args: Any, trace: Trace | None) -> tuple[StreamedUpdate, Engine]:
    config = transformers.AutoConfig.from_pretrained(args.model)
    model = without_weights(config, torch.bfloat16).train()
    anatomy = dissect(model)
    names = {id(p): n for n, p in model.named_parameters()}
    if args.arm == "ours_mini":
        patterns = [{"match": name, "rule": "apollo"} for name in anatomy.vocabulary()]
        groups = apollo_groups(model, patterns=patterns)
        optimizer = Apollo(groups, args.lr / 3, rank=1, scale_type="tensor", seed=args.seed)
    else:
        groups = [{**g, "rule": "adamw"} for g in decay_groups(model, 0.0)]
        optimizer = Apollo(groups, args.lr, rule="adamw", seed=args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    settings = Settings(folders=(args.work,), states=STATES[args.arm], ram_budget=args.ram_budget)
    layout = lay_out(anatomy, optimizer, settings, names)
    engine = Engine(
        layout, settings, folder=args.work, names=names, device=torch.device("cpu"), trace=trace
    )
    where = safetensors_of(args.model)
    assert where is not None
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    reader = read_safetensors(where, list(shapes), shapes, model.base_model_prefix)
    assert reader is not None
    engine.load(reader)
    return StreamedUpdate(engine), engine


if __name__ == "__main__":
    main()
