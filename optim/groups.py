"""Parameter groups: matrices decay, vectors (biases, norms, magnitudes) do not."""

from typing import Any

from torch import nn


def decay_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups; each group carries `param_names` in the order of
    `params`.
    """
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError("the model has no trainable parameter")
    groups = []
    for decays, rate in ((True, weight_decay), (False, 0.0)):
        chosen = [(n, p) for n, p in named if (p.ndim >= 2) == decays]
        if chosen:
            groups.append(
                {
                    "params": [p for _, p in chosen],
                    "param_names": [n for n, _ in chosen],
                    "weight_decay": rate,
                }
            )
    return groups
