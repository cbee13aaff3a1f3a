"""Trains models under FSDP2 (raw fully_shard, gloo) and writes their full weights.

    torchrun --nproc_per_node N fsdp_worker.py OUT CHECKPOINT

The last one is saved to CHECKPOINT half-way, or if that exists goes on from it.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from mnemic.optim.apollo import Apollo, ApolloMini
from mnemic.optim.select import apollo_groups
from mnemic.train.leave import leave

STEPS, HALF = 8, 4
KINDS = ("sparse", "gaussian", "mini")


class Model(nn.Module):
    """Tall, wide and square matrices of sizes that no rank count divides, experts, vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(23, 18)
        self.up = nn.Linear(18, 45)
        self.down = nn.Linear(45, 18)
        self.square = nn.Linear(18, 18, bias=False)
        self.experts = nn.Parameter(torch.randn(6, 18, 10) / 4)
        self.head = nn.Linear(10, 23)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = x + self.down(torch.tanh(self.up(x))) + self.square(x)
        return self.head(torch.einsum("bti,eio->bto", x, self.experts))


def build(kind: str, sharded: bool):
    torch.manual_seed(0)
    model = Model().double()
    model.get_output_embeddings = lambda: model.head  # type: ignore[method-assign]
    if sharded:
        from torch.distributed.fsdp import fully_shard

        for part in (model.up, model.down, model.square):
            fully_shard(part)
        fully_shard(model)
    groups = apollo_groups(model, weight_decay=0.1)
    settings = {"update_proj_gap": 3, "lr": 0.01}
    if kind == "mini":
        return model, ApolloMini(groups, **settings)
    return model, Apollo(groups, rank=5, proj=kind, **settings)


def train(model, optimizer, steps) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        # Every rank sees the same rows, so the mean over ranks is what one process computes.
        ids = torch.randint(23, (4, 9), generator=generator)
        loss = nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def held_elements(optimizer) -> int:
    tensors = [t for state in optimizer.state.values() for t in state.values()]
    return sum((t.to_local() if hasattr(t, "to_local") else t).numel() for t in tensors)


def full_weights(model):
    return {n: p.full_tensor() for n, p in model.named_parameters()}


def main() -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    out, checkpoint = sys.argv[1:]
    dist.init_process_group("gloo")
    found = {}
    for kind in KINDS:
        model, optimizer = build(kind, sharded=True)
        train(model, optimizer, range(STEPS))
        found[kind] = {"weights": full_weights(model), "held": held_elements(optimizer)}

    model, optimizer = build("sparse", sharded=True)
    written = Path(checkpoint).exists()
    dist.barrier()
    if not written:
        train(model, optimizer, range(HALF))
    weights, state = get_state_dict(model, optimizer)
    parts = {"model": weights, "optimizer": state}
    if not written:
        dcp.save(parts, checkpoint_id=checkpoint)
    else:
        dcp.load(parts, checkpoint_id=checkpoint)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    train(model, optimizer, range(HALF, STEPS))
    found["resumed"] = {"weights": full_weights(model), "held": held_elements(optimizer)}
    if dist.get_rank() == 0:
        torch.save(found, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    leave(0)
