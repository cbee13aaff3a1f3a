"""Optimizers to compare with: AdamW8bit (bitsandbytes), Adafactor (torch), Muon and GaLore
(pytorch_optimizer).

Each is one optimizer object over all trainable parameters, whose state is tensors and plain
numbers. Muon is pytorch_optimizer's and not torch's, which takes matrices only, so that a second
optimizer with a state of its own would be needed beside it, and torch 2.9.

No foreach: it stacks matrices of one shape. The stack is memory, and a batched product need not
round as one matrix alone does: then an update inside the backward would not have the same bits.
"""

import logging
from typing import Any

import torch
from torch import Tensor

from mnemic.optim.groups import decay_groups
from mnemic.optim.select import GroupSize, roles
from mnemic.train.errors import UserError
from mnemic.train.optimizers import size_table
from mnemic.train.recipe.optimizer import Adafactor, AdamW8bit, GaLore, Muon

log = logging.getLogger("mnemic")

EIGHT_BIT = 4096
"""Elements from which on bitsandbytes keeps moments of one byte."""


def build_peer(part: Any, model: Any) -> torch.optim.Optimizer:
    """The optimizer of an `AdamW8bit`, `Adafactor`, `Muon` or `GaLore` part."""
    if isinstance(part, AdamW8bit):
        from bitsandbytes.optim.adamw import AdamW8bit as BitsAndBytesAdamW8bit

        sizes = [p.numel() for p in model.parameters() if p.requires_grad]
        if max(sizes) < EIGHT_BIT:
            log.warning(
                "optimizer.kind=adamw8bit has no effect here: the largest of %d trained tensors "
                "has %s elements, and below %s moments are fp32, which is adamw; set that",
                len(sizes), f"{max(sizes):,}", f"{EIGHT_BIT:,}",
            )  # fmt: skip
        return BitsAndBytesAdamW8bit(
            decay_groups(model, part.weight_decay),
            lr=part.lr, betas=(part.beta1, part.beta2), eps=part.eps, weight_decay=0.0,
        )  # fmt: skip
    if isinstance(part, Adafactor):
        return torch.optim.Adafactor(
            decay_groups(model, part.weight_decay),
            lr=part.lr, beta2_decay=part.beta2_decay, d=part.clip_threshold,
            eps=(None, part.least_scale), foreach=False,
        )  # fmt: skip
    assert isinstance(part, (Muon, GaLore))
    groups = _role_groups(part, model)
    for line in size_table(_size(group) for group in groups):
        log.info(line)
    if isinstance(part, GaLore):
        from mnemic.train.galore import TensorStateGaLore

        return TensorStateGaLore(groups, foreach=False)
    import pytorch_optimizer

    return pytorch_optimizer.Muon(groups, foreach=False)


def _role_groups(part: Muon | GaLore, model: Any) -> list[dict[str, Any]]:
    """Groups of matrices (the role, not the shape: no embedding, no head), then AdamW's."""
    params, found = dict(model.named_parameters()), roles(model)
    groups: dict[Any, dict[str, Any]] = {}
    for name, role in found.items():
        param = params[name]
        settings: dict[str, Any] = {
            "weight_decay": part.weight_decay if param.ndim >= 2 else 0.0,
            # Counted in the group, and present from the start: who steps one tensor at a time
            # restores only what was there before.
            "step": 0,
        }
        if role != "matrix":
            settings |= {
                "lr": part.rest_lr or part.lr, "betas": (part.beta1, part.beta2), "eps": part.eps,
            }  # fmt: skip
            if isinstance(part, Muon):
                settings["use_muon"] = False
        elif isinstance(part, Muon):
            settings |= {
                "use_muon": True, "lr": part.lr, "momentum": part.momentum,
                "nesterov": part.nesterov, "ns_steps": part.ns_steps,
                "use_adjusted_lr": part.match_rms_adamw,
            }  # fmt: skip
        else:
            smaller = min(param.shape)
            rank = max(1, round(part.rank * smaller)) if part.rank < 1 else int(part.rank)
            settings |= {
                "rank": min(smaller, rank), "lr": part.lr, "betas": (part.beta1, part.beta2),
                "eps": part.eps, "scale": part.scale, "update_proj_gap": part.update_proj_gap,
                "projection_type": "std",
            }  # fmt: skip
        key = (role != "matrix", settings.get("rank"), settings["weight_decay"])
        group = groups.setdefault(key, {"params": [], "param_names": [], **settings})
        group["params"].append(param)
        group["param_names"].append(name)
    body = [n for n, role in found.items() if role not in ("embedding", "head")]
    matrices = sum(params[n].numel() for n in body if found[n] == "matrix")
    total = sum(params[n].numel() for n in body)
    if matrices == 0 or matrices < part.min_coverage * total:
        raise UserError(
            f"optimizer.kind={part.kind} would have {matrices:,} of the {total:,} trainable "
            f"parameters that are neither embedding nor head, and at least {part.min_coverage:.0%} "
            "of them is expected; lower optimizer.min_coverage, or take apollo, which has experts "
            "too, or adamw"
        )
    # The matrices first: their learning rate is the one that is logged.
    return [groups[key] for key in sorted(groups, key=lambda k: (k[0], k[1] or 0, -k[2]))]


def _size(group: dict[str, Any]) -> GroupSize:
    params, names = group["params"], group["param_names"]
    rule = "adamw"
    if "rank" in group:
        rule = f"galore rank {group['rank']}"
    elif group.get("use_muon"):
        rule = "muon"
    return GroupSize(
        rule, len(params), sum(p.numel() for p in params),
        sum(_state_bytes(group, p) for p in params),
        names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}",
    )  # fmt: skip


def _state_bytes(group: dict[str, Any], param: Tensor) -> int:
    """Bytes of state of `param`, in its own dtype: GaLore's is two moments and the projection."""
    if "rank" in group:
        return param.element_size() * group["rank"] * (2 * max(param.shape) + min(param.shape))
    return param.element_size() * param.numel() * (1 if group.get("use_muon") else 2)
