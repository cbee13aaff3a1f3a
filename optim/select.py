"""Which parameter gets which rule, by the role it plays in the model, not by its name.

The low-rank rule is for the matrices of the network's body: Linear and Conv1D weights, and experts
held as one 3-D parameter. Embeddings, the output head, norms, biases and everything unknown get the
second rule. A tied weight counts once, as embedding; a frozen one not at all. Patterns overrule
roles, first match first.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from mnemic.optim.rules import DEFAULTS, RULES, rank_of, rule_of

BODY = ("matrix", "experts")
ROLES = (*BODY, "embedding", "head", "vector", "other")


class SelectionError(ValueError):
    """A pattern or a coverage that cannot be meant."""


def roles(model: nn.Module) -> dict[str, str]:
    """Role of each trainable parameter by name, tied ones once."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    head_weight = getattr(head, "weight", None)
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for param in module.parameters(recurse=False):
            owners.setdefault(id(param), []).append(module)
    return {
        name: _role(param, owners[id(param)], param is head_weight)
        for name, param in model.named_parameters()
        if param.requires_grad
    }


def _role(param: Tensor, owners: Sequence[nn.Module], is_head: bool) -> str:
    if any(isinstance(m, (nn.Embedding, nn.EmbeddingBag)) for m in owners):
        return "embedding"
    if is_head:
        return "head"
    if param.ndim < 2:
        return "vector"
    # transformers' Conv1D is a Linear with its weight transposed; torch's Conv1d is a convolution.
    if param.ndim == 2 and any(
        isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D" for m in owners
    ):
        return "matrix"
    convolution = any("Conv" in type(m).__name__ for m in owners)
    return "experts" if param.ndim == 3 and not convolution else "other"


def apollo_groups(
    model: nn.Module,
    *,
    weight_decay: float = 0.0,
    rest: Mapping[str, Any] | None = None,
    patterns: Sequence[Mapping[str, Any]] = (),
    min_coverage: float = 0.5,
) -> list[dict[str, Any]]:
    """Parameter groups for `Apollo`, over all trainable parameters of `model`.

    `rest`: settings of everything outside the body, by default `{"rule": "adamw"}`. `patterns`:
    mappings with `match`, a glob over parameter names or `role:NAME`, and settings of a group
    (`rule`, `lr`, `rank`, ...); the first that matches a parameter wins. Weight decay is for
    parameters of two and more dimensions. SelectionError for a pattern that takes nothing, and
    where the low-rank rule has less than `min_coverage` of the trainable parameters that are
    neither embedding nor head.
    """
    found = roles(model)
    if not found:
        raise SelectionError("the model has no trainable parameter")
    other = {"rule": "adamw", **(rest or {})}
    params = dict(model.named_parameters())
    taken, matched, low_rank = ([0] * len(patterns) for _ in range(3))
    groups: dict[Any, dict[str, Any]] = {}
    for name, role in found.items():
        param = params[name]
        settings = {} if role in BODY else dict(other)
        hits = [i for i, p in enumerate(patterns) if _matches(p["match"], name, role)]
        for i in hits:
            matched[i] += 1
        if hits:
            taken[hits[0]] += 1
            chosen = {k: v for k, v in patterns[hits[0]].items() if k != "match"}
            # A pattern that names a rule starts from nothing; one that does not, from the role's.
            settings = {**({} if "rule" in chosen else settings), **chosen}
        settings.setdefault("rule", "apollo")
        if hits and rule_of(settings, param) == "apollo":
            low_rank[hits[0]] += 1
        if "weight_decay" not in settings:
            settings["weight_decay"] = weight_decay if param.ndim >= 2 else 0.0
        key = tuple(sorted((k, str(v)) for k, v in settings.items()))
        group = groups.setdefault(key, {"params": [], "param_names": [], **settings})
        group["params"].append(param)
        group["param_names"].append(name)
    _check_patterns(patterns, matched, taken, low_rank, found)
    _check_coverage(list(groups.values()), found, params, min_coverage)
    # The low-rank groups first: their learning rate is the one that is logged.
    return sorted(groups.values(), key=lambda g: RULES.index(g["rule"]))


def _matches(pattern: str, name: str, role: str) -> bool:
    if pattern.startswith("role:"):
        return pattern[5:] == role
    return fnmatchcase(name, pattern)


def _check_patterns(
    patterns: Sequence[Mapping[str, Any]], matched: list[int], taken: list[int],
    low_rank: list[int], found: Mapping[str, str],
) -> None:  # fmt: skip
    for pattern, hits, kept, low in zip(patterns, matched, taken, low_rank, strict=True):
        idle = sorted({"rank", "scale"} & pattern.keys())
        if kept and idle and not low:
            raise SelectionError(
                f"pattern {pattern['match']!r} sets {' and '.join(idle)}, and every parameter it "
                "takes has AdamW, which has neither; leave it out, or add rule: apollo"
            )
        if kept:
            continue
        names = list(found)
        reason = (
            f"all {hits} parameters it matches are taken by patterns before it"
            if hits
            else f"no trainable parameter has that name or role; names are such as {names[0]} and "
            f"{names[len(names) // 2]}, roles {', '.join(sorted(set(found.values())))}"
        )
        raise SelectionError(f"pattern {pattern['match']!r} takes nothing: {reason}")


def _check_coverage(
    groups: Sequence[Mapping[str, Any]], found: Mapping[str, str], params: Mapping[str, Tensor],
    least: float,
) -> None:  # fmt: skip
    low = sum(
        p.numel()
        for g in groups
        for n, p in zip(g["param_names"], g["params"], strict=True)
        if rule_of({**DEFAULTS, **g}, p) == "apollo" and found[n] not in ("embedding", "head")
    )
    body = sum(params[n].numel() for n, role in found.items() if role not in ("embedding", "head"))
    if body == 0 or low < least * body or low == 0:
        raise SelectionError(
            f"the low-rank rule would have {low:,} of the {body:,} trainable parameters that are "
            f"neither embedding nor head, and at least {least:.0%} of them is expected; check the "
            "patterns, lower min_coverage, or take adamw"
        )


@dataclass(frozen=True)
class GroupSize:
    """One line of the table: a group and what it costs."""

    rule: str
    tensors: int
    parameters: int
    state_bytes: int
    examples: str


def group_sizes(groups: Sequence[Mapping[str, Any]]) -> list[GroupSize]:
    """Sizes of `Apollo` groups; `state_bytes` is exact (tests compare it with the state)."""
    sizes = []
    for group in groups:
        full = {**DEFAULTS, **group}
        params, names = group["params"], group["param_names"]
        shown = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"
        rank = f" rank {full['rank']}" if full["rule"] == "apollo" else ""
        sizes.append(
            GroupSize(
                full["rule"] + rank, len(params), sum(p.numel() for p in params),
                sum(state_bytes(full, p) for p in params), shown,
            )
        )  # fmt: skip
    return sizes


def state_bytes(group: Mapping[str, Any], param: Tensor) -> int:
    """Bytes of state that `Apollo` keeps for `param`: for a matrix 4 * (2 n rank + 2)."""
    from mnemic.optim.adamw import state_bytes as elementwise

    wide = 8 if param.element_size() == 8 else 4
    rule = rule_of(dict(group), param)
    if rule != "apollo":
        return 4 + elementwise(param.numel(), wide, eight_bit=rule == "adamw8bit")
    stack = param.numel() // (param.shape[-1] * param.shape[-2])
    low = max(param.shape[-2:]) * rank_of(dict(group), param)
    return 4 + wide * stack * (2 * low + 1)
