"""From the recipe's optimizer part to an optimizer over a model's trainable parameters."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from mnemic.optim.groups import decay_groups
from mnemic.train.errors import UserError
from mnemic.train.recipe.optimizer import AdamW, Apollo, ApolloMini, Optimizer, Sgd

if TYPE_CHECKING:
    from mnemic.optim.select import GroupSize

log = logging.getLogger("mnemic")


def build_optimizer(part: Optimizer, model: Any, *, seed: int = 0) -> torch.optim.Optimizer:
    """The optimizer over all trainable parameters; matrices decay, vectors do not.

    `seed` is that of random projections and of rounding.
    """
    if isinstance(part, (Apollo, ApolloMini)):
        return _apollo(part, model, seed)
    groups = decay_groups(model, part.weight_decay)
    if isinstance(part, AdamW):
        devices = {p.device.type for group in groups for p in group["params"]}
        return torch.optim.AdamW(
            groups,
            lr=part.lr,
            betas=(part.beta1, part.beta2),
            eps=part.eps,
            fused=devices <= {"cpu", "cuda", "xpu", "mps"},
        )
    if isinstance(part, Sgd):
        return torch.optim.SGD(groups, lr=part.lr, momentum=part.momentum)
    from mnemic.train.peers import build_peer

    return build_peer(part, model)


def _apollo(part: Apollo | ApolloMini, model: Any, seed: int) -> torch.optim.Optimizer:
    from mnemic.optim import apollo
    from mnemic.optim.select import SelectionError, apollo_groups

    rest: dict[str, Any] = {"rule": part.rest}
    if part.rest_lr is not None:
        rest["lr"] = part.rest_lr
    try:
        groups = apollo_groups(
            model,
            weight_decay=part.weight_decay,
            rest=rest,
            patterns=[pattern.settings() for pattern in part.patterns],
            min_coverage=part.min_coverage,
        )
    except SelectionError as error:
        raise UserError(f"optimizer: {error}") from error
    settings: dict[str, Any] = {
        "betas": (part.beta1, part.beta2),
        "eps": part.eps,
        "scale": part.scale,
        "scale_sq": part.scale_sq,
        "update_proj_gap": part.update_proj_gap,
        "proj": part.proj,
        "proj_entries": part.proj_entries,
        "gamma": part.gamma,
        "rounding": part.rounding,
        "seed": seed,
        "cache_projection": part.cache_projection,
        "compile": part.compile,
    }
    if part.cache_projection and part.proj == "sparse" and part.proj_entries == 1:
        log.warning("optimizer.cache_projection has no effect: sparse projections are kept anyway")
    if isinstance(part, Apollo):
        settings |= {"rank": part.rank, "scale_type": part.scale_type}
        optimizer = apollo.Apollo(groups, part.lr, **settings)
    else:
        optimizer = apollo.ApolloMini(groups, part.lr, **settings)
    for line in group_table(optimizer.param_groups):
        log.info(line)
    return optimizer


def group_table(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a table of `Apollo` groups: rule, tensors, parameters, state bytes, names."""
    from mnemic.optim.select import group_sizes

    return size_table(group_sizes(groups))


def size_table(sizes: "Iterable[GroupSize]") -> list[str]:
    lines = [f"{'rule':<20}{'tensors':>8}{'parameters':>15}{'state bytes':>15}  which"]
    lines += [
        f"{s.rule:<20}{s.tensors:>8}{s.parameters:>15,}{s.state_bytes:>15,}  {s.examples}"
        for s in sizes
    ]
    return lines
