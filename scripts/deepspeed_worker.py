"""One arm of `bench_offload.py` in a process of its own: AdamW in RAM, or DeepSpeed ZeRO-3 with
CPU or NVMe offload.

    python scripts/deepspeed_worker.py --arm ds_nvme_tuned --model FOLDER --work FOLDER --ids FILE

Every arm loads the same checkpoint, computes in bf16 and keeps fp32 master weights and moments;
gradient checkpointing, no clipping, no decay; the loss is the mean over a row's next tokens.
Standard output gets one JSON line, everything else goes to standard error.

- adamw_ram: plain torch, 16 bytes a parameter: bf16 weight and gradient, fp32 master and moments.
- ds_nvme_default: sub-groups, number of parameter buffers and aio as DeepSpeed has them; the size
  of the buffers fits the model, for the default of 1e8 would cost small models far more.
- ds_nvme_tuned: the least memory found with DeepSpeed 0.19.8: one buffer, and sub-groups so small
  that each tensor is one. A group closes when it *exceeds* `sub_group_size`, so with the largest
  tensor's size two large tensors share one.
- ds_cpu: weights and states in host memory.

Found by comparing losses with adamw_ram: checkpointing must be reentrant, for with NVMe parameters
the other kind computes wrong gradients without a word. With `stage3_max_live_parameters` and
`stage3_max_reuse_distance` at their defaults the second step stops with "Not enough buffers" (issue
3062). A tensor smaller than aio's `block_size` never leaves RAM.
"""

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ARMS = ("adamw_ram", "ds_nvme_default", "ds_nvme_tuned", "ds_cpu")
BETAS, EPS = (0.9, 0.999), 1e-8


def load(folder: Path) -> Any:
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": True})
    return model.train()


def adamw_in_ram(args: argparse.Namespace) -> Callable[[Any], float]:
    """One optimizer a tensor, so that only one gradient at a time has an fp32 copy."""
    import torch

    model = load(args.model)
    how = {"lr": args.lr, "betas": BETAS, "eps": EPS, "weight_decay": 0.0, "fused": True}
    pairs = []
    for param in model.parameters():
        master = param.detach().float()
        pairs.append((param, master, torch.optim.AdamW([master], **how)))

    def step(ids: Any) -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        for param, master, optimizer in pairs:
            master.grad, param.grad = param.grad.float(), None
            optimizer.step()
            master.grad = None
            param.data.copy_(master)
        return float(loss)

    return step


def settings(args: argparse.Namespace, largest: int) -> dict[str, Any]:
    """DeepSpeed's configuration of an arm; `largest` is the elements of the largest tensor."""
    cpu, tuned = {"device": "cpu", "pin_memory": False}, args.arm == "ds_nvme_tuned"
    zero: dict[str, Any] = {
        "stage": 3, "overlap_comm": False, "reduce_bucket_size": 1_000_000,
        "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 0,
        "offload_param": cpu, "offload_optimizer": cpu,
    }  # fmt: skip
    if args.arm != "ds_cpu":
        nvme = {"device": "nvme", "nvme_path": str(args.work), "pin_memory": False}
        buffers = {"buffer_count": 1 if tuned else 5, "buffer_size": largest, "max_in_cpu": 0}
        zero["offload_param"] = nvme | buffers
        zero["offload_optimizer"] = nvme | {"buffer_count": 4}
    if tuned:
        zero["sub_group_size"] = 1_000_000
    adamw = {"lr": args.lr, "betas": BETAS, "eps": EPS, "weight_decay": 0.0}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": 1_000_000_000,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": adamw},
        "zero_optimization": zero,
    }


def with_deepspeed(args: argparse.Namespace) -> Callable[[Any], float]:
    import deepspeed

    deepspeed.init_distributed("gloo")
    model = load(args.model)
    # DeepSpeed casts buffers as well, and rotary frequencies in bf16 are other frequencies.
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    config = settings(args, max(p.numel() for p in model.parameters()))
    engine, *_ = deepspeed.initialize(model=model, config=config)
    for name, buffer in model.named_buffers():
        buffer.data = buffers[name]

    def step(ids: Any) -> float:
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        return float(loss)

    return step


def import_all(arm: str) -> dict[str, str]:
    """Imports what the arm needs, DeepSpeed's compiled operators with it; the versions."""
    import torch
    import transformers.models.llama.modeling_llama

    found = {m.__name__: m.__version__ for m in (torch, transformers)}
    if arm.startswith("ds_"):
        import deepspeed
        from deepspeed.ops.op_builder.cpu import AsyncIOBuilder, CPUAdamBuilder

        CPUAdamBuilder().load()
        AsyncIOBuilder().load()
        found["deepspeed"] = deepspeed.__version__
    return found


def proc(name: str, key: str) -> int:
    """The number on a line of /proc/self/NAME."""
    lines = Path(f"/proc/self/{name}").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))


def moved() -> tuple[int, int]:
    """Bytes this process has read from and written to disks so far."""
    return proc("io", "read_bytes"), proc("io", "write_bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description="One arm of bench_offload.py.")
    parser.add_argument("--arm", required=True, choices=ARMS)
    parser.add_argument("--model", required=True, type=Path, help="folder of a Llama checkpoint")
    parser.add_argument("--work", required=True, type=Path, help="where weights and states go")
    parser.add_argument("--ids", required=True, type=Path, help="JSON: a list of token ids a step")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    # Compilers, DeepSpeed and its launcher print what they like on standard output.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ["DS_ACCELERATOR"] = "cpu"
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    # Another ninja than this environment's builds every operator anew.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    os.environ.update(alone, MASTER_PORT=os.environ.get("MASTER_PORT", "29511"), PATH=path)
    versions = import_all(args.arm)
    after_imports = proc("status", "VmRSS") * 1024
    import torch

    torch.manual_seed(args.seed)
    args.work.mkdir(parents=True, exist_ok=True)
    rows = json.loads(args.ids.read_text())[: args.steps]
    began = time.perf_counter()
    step = adamw_in_ram(args) if args.arm == "adamw_ram" else with_deepspeed(args)
    init_seconds = time.perf_counter() - began
    losses, seconds, traffic = [], [], []
    for row in rows:
        before, start = moved(), time.perf_counter()
        losses.append(step(torch.tensor([row[: args.tokens]])))
        seconds.append(time.perf_counter() - start)
        traffic.append([now - then for now, then in zip(moved(), before, strict=True)])
    report = {
        "losses": losses,
        "step_seconds": seconds,
        "rss_after_imports": after_imports,
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "read_bytes_per_step": [read for read, _ in traffic],
        "written_bytes_per_step": [written for _, written in traffic],
        "disk_bytes": sum(f.stat().st_blocks * 512 for f in args.work.rglob("*") if f.is_file()),
        "init_seconds": init_seconds,
        "vm_lck": proc("status", "VmLck") * 1024,
        "versions": versions,
    }
    print(json.dumps(report), file=answer, flush=True)


if __name__ == "__main__":
    main()
