"""How much a token is worth keeping, from what a layer is about to see.

A score is a function of `Look` that gives (B, S), higher stays. It runs without gradients, outside
the layer's checkpoint, so a recomputed layer has the same tokens.

lemo: largest ReLU(q k^T) over heads in blocks of 64 x 64, summed over queries (arXiv 2501.09767).
attention: how much the queries that predict a target attend to it. model: the same, in a small
model, before the forward begins (after SpeContext). innovation: how badly a
token's hidden state is foretold by those before it (after B'MOJO, arXiv 2407.06324). norm: length
of the hidden state. window: the last tokens. random: any.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mnemic.models.exact.attention import capture, plain_forward, visible
from mnemic.models.tokens.kernels import block_scores
from mnemic.models.tokens.select import Row

_QUERIES = 256
"""Most queries whose attention is looked at; evenly spread over the supervised ones."""


@dataclass
class Look:
    """A layer and its call: `hidden` (B, S, H) detached; what came beside it, by name."""

    layer: nn.Module
    index: int
    hidden: Tensor
    kwargs: dict[str, Any]
    row: Row
    generator: torch.Generator
    block: int

    def queries_and_keys(self) -> tuple[Tensor, Tensor, float]:
        """(B, Hq, S, D), (B, Hk, S, D), scaling, as the layer's attention gets them."""
        run = plain_forward(self.layer)
        query, key, _, scaling = capture(self.layer, run, self.hidden, **self.kwargs)
        return query, key, scaling


Score = Callable[[Look], Tensor]


def random_score(look: Look) -> Tensor:
    """Drawn for each block, alike on every device."""
    batch, length, _ = look.hidden.shape
    blocks = -(-length // look.block)
    drawn = torch.rand(batch, blocks, generator=look.generator)
    return drawn.repeat_interleave(look.block, 1)[:, :length].to(look.hidden.device)


def window_score(look: Look) -> Tensor:
    batch, length, _ = look.hidden.shape
    return torch.arange(length, device=look.hidden.device).float().expand(batch, length)


def norm_score(look: Look) -> Tensor:
    return torch.linalg.vector_norm(look.hidden, dim=-1, dtype=torch.float32)


def innovation_score(look: Look) -> Tensor:
    """Residual of a ridge regression of each state on the last one and a fading mean of all before,
    in 64 random directions.
    """
    batch, length, width = look.hidden.shape
    size = min(64, width)
    draw = torch.randn(width, size, generator=look.generator).to(look.hidden.device)
    x = look.hidden.float() @ draw / width**0.5
    x = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True).clamp_min(1e-6)
    decay = 0.9 ** torch.arange(32, device=x.device, dtype=torch.float32)
    weights = (decay / decay.sum()).flip(0).view(1, 1, -1)
    flat = x.transpose(1, 2).reshape(-1, 1, length)
    fading = torch.nn.functional.conv1d(torch.nn.functional.pad(flat, (32, 0)), weights)
    fading = fading[:, :, :length].view(batch, size, length).transpose(1, 2)
    last = torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]
    past = torch.cat([last, fading], -1)
    gram = past.transpose(1, 2) @ past
    gram.diagonal(dim1=1, dim2=2).add_(1e-2 * length)
    weight = torch.linalg.solve(gram, past.transpose(1, 2) @ x)
    return (x - past @ weight).norm(dim=-1)


def lemo_score(look: Look) -> Tensor:
    query, key, scaling = look.queries_and_keys()
    pooled = block_scores(query, key, block=look.block, scale=scaling, causal=True)
    return pooled.sum(1).repeat_interleave(look.block, 1)[:, : look.hidden.shape[1]]


def attention_score(look: Look) -> Tensor:
    query, key, scaling = look.queries_and_keys()
    return attention_mass(query, key, scaling, look.row, look.kwargs.get("attention_mask"))


def attention_mass(
    query: Tensor, key: Tensor, scaling: float, row: Row, mask: Tensor | None
) -> Tensor:
    """Attention, fp32 (B, S), that each token gets from the supervised queries (all, where there
    are none), summed over heads. `query` (B, Hq, S, D), `key` (B, Hk, S, D).
    """
    batch, heads, length, _ = query.shape
    groups = heads // key.shape[1]
    found = query.new_zeros(batch, length, dtype=torch.float32)
    for b in range(batch):
        places = _spread(row.supervised[b])
        q = query[b][:, places].float() * scaling
        k = key[b].float().repeat_interleave(groups, 0)
        logits = q @ k.transpose(1, 2)
        own = mask if mask is None or len(mask) == 1 else mask[b : b + 1]
        shown = visible(places, length, own, places)
        assert shown is not None
        if shown.dtype == torch.bool:
            logits = logits.masked_fill(~shown[0], float("-inf"))
        else:
            logits = logits + shown[0].float()
        found[b] = logits.softmax(-1).sum((0, 1))
    return found


def _spread(supervised: Tensor) -> Tensor:
    """Positions of up to `_QUERIES` supervised tokens, or of all."""
    places = supervised.nonzero()[:, 0]
    if not len(places):
        places = torch.arange(len(supervised), device=supervised.device)
    if len(places) > _QUERIES:
        places = places[torch.linspace(0, len(places) - 1, _QUERIES, device=places.device).long()]
    return places


SCORES: dict[str, Score] = {
    "attention": attention_score,
    "lemo": lemo_score,
    "innovation": innovation_score,
    "norm": norm_score,
    "random": random_score,
    "window": window_score,
}
