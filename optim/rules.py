"""What a parameter group of `Apollo` may say, and what is wrong with one that says otherwise."""

from typing import Any

import torch
from torch import Tensor

from mnemic.optim.int8 import Int8Weight

RULES = ("apollo", "adamw", "adamw8bit")
DEFAULTS: dict[str, Any] = {
    "rule": "apollo",
    "lr": 1e-3,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "rank": 0.25,
    "scale": "auto",
    "scale_sq": None,
    "scale_type": "channel",
    "update_proj_gap": 200,
    "proj": "sparse",
    "proj_entries": 1,
    "gamma": 1.01,
    "rounding": "stochastic",
    "reference": False,
}
_CHOICES = {
    "rule": RULES,
    "scale_type": ("channel", "tensor"),
    "proj": ("sparse", "gaussian"),
    "rounding": ("stochastic", "nearest"),
}
# What torch, its schedulers and its loaders add.
_FOREIGN = {"params", "param_names", "names", "initial_lr"}


def check_group(group: dict[str, Any]) -> None:
    """ValueError with every key of `group` that is unknown or out of range."""
    wrong = [
        f"{key}: unknown key; a group takes {', '.join(DEFAULTS)}"
        for key in sorted(group.keys() - DEFAULTS.keys() - _FOREIGN)
    ]
    wrong += [
        f"{key}={group[key]!r}: one of {', '.join(choices)}"
        for key, choices in _CHOICES.items()
        if group[key] not in choices
    ]
    rank, scale, betas = group["rank"], group["scale"], group["betas"]
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    tests = {
        "lr": float(group["lr"]) >= 0,
        "betas": len(betas) == 2 and all(0 <= b < 1 for b in betas),
        "eps": group["eps"] > 0,
        "weight_decay": group["weight_decay"] >= 0,
        "rank": whole or (isinstance(rank, float) and 0 < rank < 1),
        "scale": scale == "auto" or (isinstance(scale, (int, float)) and scale > 0),
        "scale_sq": group["scale_sq"] is None or (group["scale_sq"] > 0 and scale == "auto"),
        "update_proj_gap": group["update_proj_gap"] >= 1,
        "proj_entries": group["proj_entries"] >= 1,
        "gamma": group["gamma"] is None or group["gamma"] > 1,
    }
    allowed = {
        "rank": "a whole number from 1, or a share of min(m, n) between 0 and 1",
        "scale": '"auto" or a number above 0, which is alpha',
        "scale_sq": "a number above 0, which is alpha squared, and then no scale",
        "gamma": "a growth factor above 1, or None for no limiter",
        "betas": "two numbers from 0 to below 1",
    }
    wrong += [
        f"{key}={group[key]!r}: {allowed.get(key, 'out of range')}"
        for key, fine in tests.items()
        if not fine
    ]
    if wrong:
        raise ValueError("Apollo parameter group: " + "; ".join(wrong))


def rule_of(group: dict[str, Any], param: Tensor) -> str:
    """The group's rule; in an `apollo` group, parameters that are neither a matrix nor a stack of
    matrices have `adamw`.
    """
    if group["rule"] == "apollo" and param.ndim not in (2, 3):
        return "adamw"
    return group["rule"]


def rank_of(group: dict[str, Any], param: Tensor) -> int:
    """The rank for `param`, at most min(m, n)."""
    smaller, rank = min(param.shape[-2:]), group["rank"]
    return min(smaller, max(1, round(rank * smaller)) if isinstance(rank, float) else rank)


def alpha_of(group: dict[str, Any], param: Tensor) -> float:
    """The scale for `param`, as a factor of the update."""
    if group["scale_sq"] is not None:
        return group["scale_sq"] ** 0.5
    if group["scale"] == "auto":
        return (min(param.shape[-2:]) / rank_of(group, param)) ** 0.5
    return float(group["scale"])


def wants_noise(group: dict[str, Any], weight: Tensor) -> bool:
    narrow = weight.dtype == torch.bfloat16 or isinstance(weight, Int8Weight)
    return group["rounding"] == "stochastic" and narrow
