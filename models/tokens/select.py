"""Which tokens stay: those that must, then blocks by score until the budget is full."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mnemic.models.tokens.config import TokensConfig


@dataclass
class Row:
    """What a forward's rows are, before any layer: `supervised` (B, S) bool, positions that predict
    a target or are one; `valid` (B, S) bool or None, no padding; `positions` (B, S) of packed rows
    or None. `planned`: the number of tokens to keep, where contents are not known (fake tensors).
    """

    supervised: Tensor
    valid: Tensor | None = None
    positions: Tensor | None = None
    planned: int | None = None
    required: Tensor = field(init=False)

    def require(self, config: TokensConfig) -> None:
        """Find the tokens (B, S) that no score may drop."""
        batch, length = self.supervised.shape
        device = self.supervised.device
        places = torch.arange(length, device=device)
        ends = (
            torch.full((batch,), length, device=device) if self.valid is None
            else self.valid.sum(1)
        )  # fmt: skip
        found = (places < config.sinks * config.block)[None] & (places[None] < ends[:, None])
        last = ends[:, None] - config.recent * config.block
        found = found | ((places[None] >= last) & (places[None] < ends[:, None]))
        if config.protect:
            found = found | self.supervised
        if self.positions is not None and config.sinks:
            found = found | (self.positions == 0)  # a document's own first token
        if self.valid is not None:
            found = found & self.valid
        self.required = found

    def count(self, config: TokensConfig, keep: float, above: Tensor | None = None) -> int:
        """Tokens to keep of each row, in whole blocks: the share, or the most that are `above`
        (B, S) bool in any row, or more where more must stay.
        """
        length = self.supervised.shape[1]
        step = max(config.block, 1)
        most = keep * length if above is None else int((above | self.required).sum(1).max())
        most = math.ceil(most / step) * step
        must = self.planned if self.planned is not None else int(self.required.sum(1).max())
        return min(length, max(most, math.ceil(must / 8) * 8, 1))


def choose(
    score: Tensor, row: Row, config: TokensConfig, keep: float, layer: int | None = None
) -> Tensor:
    """Sorted index (B, K) int64 of the tokens that stay. `score` (B, S), higher stays; blocks are
    judged by their mean. Equal scores: the earlier token. Padding only fills up short rows.

    With `config.thresholds`: blocks whose `relative` score reaches that of `layer`; K is what the
    row with most of them needs, other rows add their next best. Where the schedule has raised
    `keep` above the config's, no fewer than that share. Contents unknown (`planned`): the share.
    ValueError for a layer without a threshold.
    """
    value = pool(score.float(), config.block)
    above = None
    if config.thresholds is not None and row.planned is None:
        if layer not in config.thresholds:
            raise ValueError(
                f"thresholds has none for layer {layer}; profile with the same layers and share"
            )
        above = relative(value, row) >= config.thresholds[layer]
    count = row.count(config, keep, above)
    if above is not None and keep > config.keep:
        count = max(count, row.count(config, keep))
    value = value.masked_fill(row.required, float("inf"))
    if row.valid is not None:
        value = value.masked_fill(~row.valid, float("-inf"))
    order = value.argsort(dim=1, descending=True, stable=True)
    return order[:, :count].sort(dim=1).values


def relative(value: Tensor, row: Row) -> Tensor:
    """Pooled scores (B, S) as shares of their row's largest, so that one threshold serves texts of
    any length and scale; padding is -inf. All 1 where no score is above 0.
    """
    if row.valid is not None:
        value = value.masked_fill(~row.valid, float("-inf"))
    largest = value.amax(1, keepdim=True)
    return torch.where(largest > 0, value / largest, torch.ones_like(value)).masked_fill(
        value == float("-inf"), float("-inf")
    )


def pool(score: Tensor, block: int) -> Tensor:
    """(B, S), each token with the mean of its block."""
    if block <= 1:
        return score
    batch, length = score.shape
    padded = torch.nn.functional.pad(score, (0, -length % block), value=float("nan"))
    means = padded.view(batch, -1, block).nanmean(-1)
    return means.repeat_interleave(block, 1)[:, :length]
