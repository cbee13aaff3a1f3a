"""Training of pattern predictors against a frozen model (LeMo, arXiv 2501.09767).

The backbone sees each text once: hidden states go to temporary files (bf16), pooled truth stays in
memory, and then each layer's predictor is trained on its own. Loss: SmoothL1 of Ahat against the
truth over the truth's mean (LeMo's), and what recall needs and a regression does not see: for a cut
drawn anew each step, every block above it should score above every block below, by a logistic loss
of the log-ratio of their column sums.

Elastic pruning (LeMo's "elastic size transformation"): at even intervals, hidden ReLU units that
were 0 in more than 80 % of the blocks since the last time are taken out of the weights, then those
in more than 75 %, 70 %, ... At least one stays.
"""

import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mnemic.models.exact.attention import by_name, capture, decoder_layers, plain_forward
from mnemic.models.tokens.kernels import block_scores
from mnemic.models.tokens.predictor import (
    BlockNet,
    PatternPredictor,
    Predictors,
    hidden_size,
)

_PRUNINGS = 4
"""Times that units are pruned, the last with a fifth of the steps left to recover."""
_SHARPNESS = 0.05
"""Log-ratio of two column sums at which the order of two blocks counts as settled."""


@torch.no_grad()
def observe(
    model: Any, ids: Tensor, layers: Sequence[int], block: int, see: Callable[..., None]
) -> None:
    """One dense forward of `ids` (B, S); `see(layer, hidden (B, S, H), truth (B, nb, nb) fp32)`."""

    def before(index: int) -> Callable[..., None]:
        def hook(layer: Any, args: Any, kwargs: Any) -> None:
            kwargs = dict(kwargs)
            hidden = args[0] if args else kwargs.pop("hidden_states")
            named = by_name(layer, args[1:], kwargs)
            query, key, _, scaling = capture(layer, plain_forward(layer), hidden, **named)
            see(index, hidden, block_scores(query, key, block=block, scale=scaling, causal=True))

        return hook

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    found, training = decoder_layers(model), model.training
    hooks = [found[i].register_forward_pre_hook(before(i), with_kwargs=True) for i in layers]
    model.eval()
    try:
        inner.base_model(input_ids=ids, use_cache=False)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()


def fit(
    model: Any,
    batches: Sequence[Tensor],
    layers: Sequence[int],
    *,
    block: int = 64,
    rank: int = 32,
    steps: int = 400,
    lr: float = 3e-3,
    seed: int = 0,
    shrink: float = 0.0,
) -> Predictors:
    """Predictors of `layers`, trained `steps` times on one of `batches`, input ids (B, S) each.
    They begin with `2 * rank` hidden units in each net. `shrink`: weight in the loss of the mean
    activation, which makes units die that are not worth it, for pruning to take. On disk
    meanwhile: 2 bytes for each number of a hidden state, layer and token. ValueError for nothing
    to train (on).
    """
    if not batches or not layers:
        raise ValueError("predictors need at least one batch of text and one layer")
    width, device = hidden_size(model), batches[0].device
    truths: dict[int, list[Tensor]] = {i: [] for i in layers}
    with tempfile.TemporaryDirectory(prefix="mnemic-predictors-") as folder:
        files: dict[int, list[Tensor]] = {i: [] for i in layers}

        def see(index: int, hidden: Tensor, truth: Tensor) -> None:
            x = _unit(hidden)
            path = Path(folder) / f"{index}-{len(files[index])}"
            file = torch.from_file(str(path), True, x.numel(), dtype=torch.bfloat16).view(x.shape)
            files[index].append(file.copy_(x))
            truths[index].append(truth.cpu())

        for ids in batches:
            observe(model, ids, layers, block, see)
        found, before = {}, 0
        for i in layers:
            with torch.random.fork_rng():
                torch.manual_seed(seed + i)
                predictor = PatternPredictor(width, (2 * rank, 2 * rank), rank, block).to(device)
                before += sum(p.numel() for p in predictor.parameters())
                _train(predictor, files[i], truths[i], steps, lr, seed + i, shrink)
            found[i] = predictor
            del files[i]
    return Predictors(found, before).requires_grad_(False)


def _unit(hidden: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=torch.float32)
    return hidden * (hidden.shape[-1] ** 0.5 / length.clamp_min(1e-6))


def _train(
    predictor: PatternPredictor,
    inputs: Sequence[Tensor],
    truths: Sequence[Tensor],
    steps: int,
    lr: float,
    seed: int,
    shrink: float,
) -> None:
    device = predictor.decay.device
    generator = torch.Generator().manual_seed(seed)
    # A few directions of hidden states are a hundred times longer than others: train on
    # standardised ones, and fold that into the projections afterwards.
    mean, spread = _moments(inputs, device)
    mass = sum(float(t.sum()) for t in truths) / sum(_seen(t) for t in truths)
    for net in (predictor.query, predictor.key):
        torch.nn.init.orthogonal_(net.into.weight)
    predictor.train()
    optimizer = torch.optim.Adam(predictor.parameters(), lr)
    schedule = [s * steps // (_PRUNINGS + 1) for s in range(1, _PRUNINGS + 1)]
    dead, seen, prunings = None, 0, 0
    for step in range(steps):
        which = int(torch.randint(len(inputs), (), generator=generator))
        x = (inputs[which].to(device).float() - mean) / spread
        truth = truths[which].to(device) / max(mass, 1e-12)
        found, units = predictor.map(x, x.new_ones(*x.shape[:2], 1))
        loss = _loss(found, truth, float(torch.rand((), generator=generator)))
        if shrink:
            loss = loss + shrink * (units[0].mean() + units[1].mean())
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = (
                lr * min(1.0, (step + 1) / 20) * (1 + math.cos(math.pi * step / steps)) / 2
            )
        optimizer.step()
        idle = [(u.detach() == 0).flatten(0, 1).sum(0) for u in units]
        dead = idle if dead is None else [a + b for a, b in zip(dead, idle, strict=True)]
        seen += units[0].shape[0] * units[0].shape[1]
        if step + 1 in schedule:
            limit = max(0.8 - 0.05 * prunings, 0.5)
            for net, count in zip((predictor.query, predictor.key), dead, strict=True):
                prune(net, count / seen, limit)
            # The moments of what is left start anew; so few steps do not notice.
            optimizer = torch.optim.Adam(predictor.parameters(), lr)
            dead, seen, prunings = None, 0, prunings + 1
    for net in (predictor.query, predictor.key):
        with torch.no_grad():
            net.into.weight.div_(spread)
            net.into.bias.sub_(net.into.weight @ mean)
    predictor.eval()


def prune(net: BlockNet, dead: Tensor, limit: float) -> int:
    """Take out units whose share of blocks without activation (`dead`) is above `limit`: how many.
    The least dead one stays.
    """
    units = (dead <= limit).nonzero()[:, 0]
    if not len(units):
        units = dead.argmin()[None]
    gone = len(dead) - len(units)
    if gone:
        net.keep(units)
    return gone


def _loss(found: Tensor, truth: Tensor, cut: float) -> Tensor:
    """`found`, `truth` (B, nb, nb), of mean 1 over what is seen; `cut` in [0, 1)."""
    seen = torch.ones_like(truth[0], dtype=torch.bool).tril()
    regression = F.smooth_l1_loss(found[:, seen], truth[:, seen])
    blocks = truth.shape[1]
    if blocks < 2:
        return regression
    count = 1 + int(cut * (blocks - 1))
    order = truth.sum(1).argsort(1, descending=True)
    logs = found.sum(1).clamp_min(1e-6).log().gather(1, order)
    margin = logs[:, :count, None] - logs[:, None, count:]
    return regression + F.softplus(-margin / _SHARPNESS).mean()


def _moments(inputs: Sequence[Tensor], device: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (H,) of all tokens."""
    count = sum(x.shape[0] * x.shape[1] for x in inputs)
    mean = torch.zeros(inputs[0].shape[-1], device=device)
    square = mean.clone()
    for x in inputs:
        flat = x.to(device).float().flatten(0, 1)
        mean += flat.sum(0) / count
        square += flat.pow(2).sum(0) / count
    return mean, (square - mean**2).clamp_min(1e-8).sqrt()


def _seen(truth: Tensor) -> int:
    blocks = truth.shape[1]
    return truth.shape[0] * blocks * (blocks + 1) // 2


@torch.no_grad()
def recall(predictors: Predictors, model: Any, input_ids: Tensor, keep: float) -> dict[int, float]:
    """By layer: of the blocks with the highest true column sums, ceil(`keep` * nb) in each row of
    `input_ids` (B, S), the share that is also among the predictor's highest.
    """
    found: dict[int, float] = {}

    def see(index: int, hidden: Tensor, truth: Tensor) -> None:
        found[index] = overlap(predictors.of(index)(hidden).sum(1), truth.sum(1), keep)

    observe(model, input_ids, [int(i) for i in predictors.layers], predictors.block, see)
    return found


def overlap(scores: Tensor, truth: Tensor, keep: float) -> float:
    """Of the top blocks by `truth` (B, nb), the share among the top by `scores`."""
    count = max(1, math.ceil(keep * truth.shape[1]))
    top = [torch.zeros_like(t).scatter_(1, t.topk(count, 1).indices, 1.0) for t in (scores, truth)]
    return float((top[0] * top[1]).sum() / (count * len(truth)))
