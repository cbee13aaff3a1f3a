"""Dropped tokens that can still be seen.

A token that a run of layers drops is not worked on any more: no attention of its own, no MLP. With
`attend="all"` the kept tokens go on attending to it: each layer makes its keys and values from the
hidden state that it was left with, as SwiftKV does to skip layers of a prompt (arXiv 2410.03960).
So nothing that the context holds is out of reach in training, and a model trained so meets nothing
new when it is run densely. LeMo and random-LTD hide dropped tokens.

The left states are the same for all layers of a run and are kept once; under checkpointing keys
and values are made again in the backward. Gradients go through them, so that early layers learn
what late ones read there: the backward is the exact one of this forward.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mnemic.models.exact.attention import capture, plain_forward
from mnemic.models.tokens.selected import attend_from, cut_call


@dataclass
class Seen:
    """A run's tokens: those at `kept` (B, K) are worked on; `left` (B, S - K, H) are the states of
    those at `others` (B, S - K). `named`: the layer's call for the whole sequence.
    """

    kept: Tensor
    others: Tensor
    left: Tensor
    named: dict[str, Any]


class VisibleForward:
    """A layer's forward on kept tokens. `look()` gives what else there is, None in a dense
    forward.
    """

    def __init__(self, layer: nn.Module, look: Callable[[], Seen | None]) -> None:
        self.layer, self.own, self.look = layer, layer.forward, look

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen = self.look()
        if seen is None:
            return self.own(hidden_states, *args, **kwargs)

        def run(x: Tensor, left: Tensor) -> Tensor:
            keys, values = self._keys_and_values(seen, left)
            return attend_from(self.layer, x, seen.kept, seen.named, keys, values)

        if getattr(self.layer, "gradient_checkpointing", False) and torch.is_grad_enabled():
            rows = checkpoint(run, hidden_states, seen.left, use_reentrant=False)
            assert isinstance(rows, Tensor)
            return rows
        return run(hidden_states, seen.left)

    def _keys_and_values(self, seen: Seen, left: Tensor) -> list[Tensor]:
        """(B, h, S, D) each, zero where tokens are kept, which bring their own."""
        call = cut_call(seen.named, seen.others)
        _, *parts, _ = capture(self.layer, plain_forward(self.layer), left, **call)
        length = seen.kept.shape[1] + seen.others.shape[1]
        found = []
        for part in parts:
            whole = part.new_zeros(*part.shape[:2], length, part.shape[3])
            places = seen.others[:, None, :, None].expand_as(part)
            found.append(whole.scatter(2, places, part))
        return found
