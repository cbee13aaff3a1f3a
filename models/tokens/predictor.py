"""LeMo's pattern predictors: block scores without attention (arXiv 2501.09767, section on the
pattern predictor).

For each layer a Q-net and a K-net read the layer's input and give q^, k^ for each block of tokens;
Ahat = q^ k^T is trained against the pooled scores of the layer's own queries and keys
(`block_scores`), with the backbone frozen, and its column sums say which blocks stay. Training is
in predictor_fit.py, elastic pruning with it.

What differs. LeMo's nets read a block as one flat vector for each head (64 tokens, 8,192 numbers),
some 600 MB of nets for a 7B model. Here a *token* is projected to few ReLU units and a block is the
largest and the mean of each unit: the truth is a largest score over pairs of tokens, so the
strongest token counts, and every token is a sample, so that some dozen texts teach something. The
input is the hidden state divided by its length (the layers' own norms see no more), whatever the
architecture's norm is. q^ and k^ are in groups, each with a decay per block of distance, because
the truth's queries and keys are rotated and a block's states do not say where it is. q^ and k^ pass
a softplus, LeMo's a ReLU: a score of 0 has no gradient. Ahat is causal.

Padding takes no part. Packed documents are seen as one text, as LeMo's score does.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mnemic.models.exact.attention import decoder_layers
from mnemic.models.tokens.scores import Look

GROUPS = 4
"""Parts of q^ and k^ that have a decay with distance each."""
DROPOUT = 0.3
"""Of block features in training: some dozen texts have few blocks (held out: recall .91 -> .93)."""


class BlockNet(nn.Module):
    """Tokens (B, S, width) -> blocks (B, nb, rank): ReLU units, their largest and their mean."""

    def __init__(self, width: int, units: int, rank: int) -> None:
        super().__init__()
        self.into = nn.Linear(width, units)
        self.out = nn.Linear(2 * units, rank)

    def forward(self, x: Tensor, scale: Tensor, block: int) -> tuple[Tensor, Tensor]:
        """`scale` (B, S, 1) fp32: what a token is multiplied with; 0 for padding. Returns also the
        largest of each unit in each block, fp32 (B, nb, units), which is 0 where the unit is dead.
        """
        # Scaled behind the projection, which needs no copy of the wide input then.
        z = F.linear(x, self.into.weight.to(x.dtype)).float() * scale + self.into.bias
        z = z.relu() * (scale > 0)
        short = -z.shape[1] % block
        z = F.pad(z, (0, 0, 0, short)).unflatten(1, (-1, block))
        count = F.pad(scale > 0, (0, 0, 0, short)).unflatten(1, (-1, block)).sum(2)
        largest, mean = z.amax(2), z.sum(2) / count.clamp_min(1)
        features = F.dropout(torch.cat([largest, mean], -1), DROPOUT, self.training)
        return F.softplus(self.out(features)) * (count > 0), largest

    @torch.no_grad()
    def keep(self, units: Tensor) -> None:
        """Leave only these hidden units (their indices)."""
        total = self.into.out_features
        into = nn.Linear(self.into.in_features, len(units))
        into.weight.copy_(self.into.weight[units])
        into.bias.copy_(self.into.bias[units])
        out = nn.Linear(2 * len(units), self.out.out_features)
        out.weight.copy_(self.out.weight[:, torch.cat([units, units + total])])
        out.bias.copy_(self.out.bias)
        self.into, self.out = into, out


class PatternPredictor(nn.Module):
    """One layer's. `width`: of its hidden states; `units`: hidden units of (Q-net, K-net); `rank`:
    of q^ and k^, a multiple of GROUPS; fp32 parameters.
    """

    def __init__(self, width: int, units: tuple[int, int], rank: int, block: int) -> None:
        super().__init__()
        if rank < GROUPS or rank % GROUPS:
            raise ValueError(f"rank={rank} must be a multiple of {GROUPS}")
        self.rank, self.block = rank, block
        self.query = BlockNet(width, units[0], rank)
        self.key = BlockNet(width, units[1], rank)
        self.decay = nn.Parameter(torch.tensor([-6.0, -3.0, -1.0, 1.0]))
        self.eval()  # a score has no dropout, whatever mode the language model is in

    @property
    def units(self) -> tuple[int, int]:
        return self.query.into.out_features, self.key.into.out_features

    def forward(self, hidden: Tensor, valid: Tensor | None = None) -> Tensor:
        """Ahat, fp32 (B, nb, nb), of `hidden` (B, S, H); `valid` (B, S): no padding."""
        length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=torch.float32)
        scale = hidden.shape[-1] ** 0.5 / length.clamp_min(1e-6)
        if valid is not None:
            scale = scale * valid[..., None]
        return self.map(hidden, scale)[0]

    def map(self, x: Tensor, scale: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Ahat, and the nets' largest activations by block."""
        q, query_units = self.query(x, scale, self.block)
        k, key_units = self.key(x, scale, self.block)
        places = torch.arange(q.shape[1], device=q.device)
        distance = (places[:, None] - places).float()
        fade = (-F.softplus(self.decay)[:, None, None] * distance.clamp_min(0)).exp()
        q, k = (t.unflatten(2, (GROUPS, -1)).transpose(1, 2) for t in (q, k))
        pairs = (q @ k.transpose(2, 3)) * fade
        return (pairs.sum(1) / self.rank).tril(), (query_units, key_units)


class Predictors(nn.Module):
    """A score for TokenSparsity: column sums of the looked-at layer's Ahat. `before_pruning`: how
    many parameters there were before elastic pruning.
    """

    def __init__(self, layers: dict[int, PatternPredictor], before_pruning: int = 0) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(i): layer for i, layer in sorted(layers.items())})
        self.block = next(iter(layers.values())).block
        self.before_pruning = before_pruning or self.size

    @property
    def size(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def of(self, layer: int) -> Any:
        if str(layer) not in self.layers:
            raise ValueError(
                f"no predictor was trained for layer {layer}, but for {', '.join(self.layers)}; "
                "train predictors for the same layers"
            )
        return self.layers[str(layer)]

    @torch.no_grad()
    def forward(self, look: Look) -> Tensor:
        """(B, S) fp32. ValueError for a layer or a block size that was not trained."""
        predictor = self.of(look.index)
        if look.block != self.block:
            raise ValueError(
                f"the predictors were trained for block={self.block}, and block is {look.block}"
            )
        if predictor.decay.device != look.hidden.device:
            self.to(look.hidden.device)
        with torch.autocast(look.hidden.device.type, enabled=False):
            scores = predictor(look.hidden, look.row.valid).sum(1)
        return scores.repeat_interleave(look.block, 1)[:, : look.hidden.shape[1]]


def flops(width: int, length: int, units: Iterable[int], rank: int, block: int) -> float:
    """Of one predictor on one row: 2 for each multiplication and addition."""
    blocks, total = -(-length // block), sum(units)
    return 2 * total * (width * length + 2 * rank * blocks) + 2 * rank * blocks**2


def save_predictors(path: str | Path, predictors: Predictors) -> None:
    """One safetensors file; shapes stand in its metadata."""
    layers: dict[str, Any] = dict(predictors.layers.items())
    shapes = {i: [*layer.units, layer.rank] for i, layer in layers.items()}
    first = next(iter(layers.values()))
    metadata = {
        "format": "mnemic predictors 1",
        "block": str(predictors.block),
        "hidden_size": str(first.query.into.in_features),
        "before_pruning": str(predictors.before_pruning),
        "layers": json.dumps(shapes),
    }
    tensors = {name: t.detach().cpu().contiguous() for name, t in predictors.state_dict().items()}
    save_file(tensors, path, metadata=metadata)


def load_predictors(path: str | Path, model: Any) -> Predictors:
    """ValueError where there is no such file, it holds something else, or another model's."""
    try:
        with safe_open(path, "pt") as file:
            found = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read predictors {path}: {error}") from error
    if found.get("format") != "mnemic predictors 1":
        raise ValueError(f"{path} holds no predictors of scripts/train_predictors.py")
    width, count = hidden_size(model), len(decoder_layers(model))
    shapes = {int(i): shape for i, shape in json.loads(found["layers"]).items()}
    if int(found["hidden_size"]) != width or max(shapes) >= count:
        raise ValueError(
            f"predictors {path} are for hidden states of {found['hidden_size']} and layers up to "
            f"{max(shapes)}; this model has {width} and {count} layers"
        )
    layers = {
        i: PatternPredictor(width, (query, key), rank, int(found["block"]))
        for i, (query, key, rank) in shapes.items()
    }
    predictors = Predictors(layers, int(found["before_pruning"]))
    try:
        predictors.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"predictors {path} are damaged: tensors do not fit metadata") from error
    return predictors.requires_grad_(False)


def hidden_size(model: Any) -> int:
    return model.config.get_text_config().hidden_size
