"""Each layer's own threshold for blocks, found by profiling (LeMo, arXiv 2501.09767, Alg. 1).

A block stays where its score, as a share of its row's largest, reaches its layer's threshold. LeMo
starts at the mean block score of some profiled text and descends along finite differences of the
accuracy; the authors' code has no such search, but a table.

What differs: scores are relative, so a threshold serves any length, scale and score function; loss
stands for accuracy; and there is a budget, `keep` on average over the sparse layers, without which
the descent keeps everything. Under a budget a threshold is worth what the tokens it drops cost, so
a layer's finite difference is divided by the tokens it saves, layers above the average get lower
thresholds and those below higher ones, and all are moved alike until the budget holds.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mnemic.models.tokens.config import TokensConfig
from mnemic.models.tokens.scores import SCORES, Look, Score
from mnemic.models.tokens.select import Row, pool, relative
from mnemic.models.tokens.sparsity import TokenSparsity

log = logging.getLogger("mnemic")

_STEP = 0.1
"""Share of a row's tokens that a finite difference drops in one layer."""
_HIGHEST = 1.01
"""A relative score reaches 1: above it only required tokens stay."""


def profile(
    model: Any,
    batches: Sequence[Mapping[str, Tensor]],
    config: TokensConfig,
    *,
    rounds: int = 2,
    score: Score | None = None,
) -> dict[int, float]:
    """Threshold of every sparse layer of `config` (layers that share a keep set have one).

    `batches`: model inputs, `input_ids` (B, S), `attention_mask` where padded, and `labels` (B, S)
    with -100 where nothing is learned (default: all that is no padding). `rounds` 0: LeMo's start,
    the mean relative block score; then each round costs a forward of all batches for every keep
    set, and one more. `score` overrides `config.score`. ValueError where thresholds have no effect.
    """
    if config.grad == "selected":
        raise ValueError("thresholds are profiled with grad=all; grad=selected never changes loss")
    if config.protect and not all("labels" in batch for batch in batches):
        raise ValueError("protect keeps every token of plain text; set it to False, or give labels")
    if not batches:
        raise ValueError("profiling needs at least one batch")
    search = _Search(model, batches, config, score or SCORES[config.score])
    search.loss(None)
    starts = [search.mean(run[0]) for run in search.runs]
    best = search.fit_budget(starts) if rounds else starts
    lowest, speed = math.inf, 1.0
    for number in range(rounds):
        loss, costs, steps = search.differences(best)
        lowest = min(lowest, loss)
        mean = sum(costs) / len(costs)
        largest = max(max(abs(c - mean) for c in costs), 1e-12)
        moves = [speed * step * (mean - c) / largest for c, step in zip(costs, steps, strict=True)]
        tried = search.fit_budget([t + m for t, m in zip(best, moves, strict=True)])
        found = search.loss(tried)
        log.info("thresholds: round %d, loss %.4f, tried %.4f", number + 1, loss, found)
        if found < lowest:
            best, lowest = tried, found
        else:
            speed /= 2
    return {layer: t for run, t in zip(search.runs, best, strict=True) for layer in run}


class _Search:
    """Losses of thresholds, and what the last forward's scores would keep at others."""

    def __init__(self, model: Any, batches: Any, config: TokensConfig, score: Score) -> None:
        if hasattr(score, "prepare"):
            raise ValueError("this score is the same for all layers; thresholds need one by layer")
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        if "token_sparsity" in inner.__dict__:
            raise ValueError("profile a model that has no token sparsity yet")
        self.model, self.inner, self.batches, self.score = model, inner, batches, score
        self.config = replace(
            config, mlp_backward_keep=None, thresholds=None, ramp=0.0, dense_end=0.0
        )
        self.runs: list[list[int]] = []
        self.seen: dict[int, list[tuple[Tensor, Row]]] = {}

    def _look(self, look: Look) -> Tensor:
        score = self.score(look)
        value = relative(pool(score.float(), look.block), look.row)
        self.seen.setdefault(look.index, []).append((value.cpu(), look.row))
        return score

    def loss(self, thresholds: list[float] | None) -> float:
        """Mean next-token loss, with dropped tokens' as well; None: of the dense model."""
        self.seen = {}
        config = replace(self.config, keep=1.0)
        if thresholds is not None:
            pairs = zip(self.runs, thresholds, strict=True)
            config = replace(self.config, thresholds={run[0]: t for run, t in pairs})
        training = self.model.training
        sparsity = TokenSparsity(self.model, config, score=self._look)
        self.runs = sparsity.runs
        total, count = 0.0, 0
        try:
            for batch in self.batches:
                inputs = {k: v for k, v in batch.items() if k != "labels"}
                targets = _targets(batch)
                # Sparsity is for training; profiling wants it without dropout and gradients.
                self.model.train()
                with torch.enable_grad():
                    sparsity.begin(inputs, targets != -100)
                self.model.eval()
                with torch.no_grad():
                    logits = self.model(**inputs, use_cache=False).logits.float()
                total += float(
                    torch.nn.functional.cross_entropy(
                        logits.flatten(0, 1), targets.flatten(), reduction="sum"
                    )
                )
                count += int((targets != -100).sum())
        finally:
            sparsity.remove()
            del self.inner.__dict__["token_sparsity"]
            self.model.train(training)
        return total / max(count, 1)

    def mean(self, layer: int) -> float:
        """Mean relative score of the layer's blocks."""
        blocks = [value[:, :: self.config.block].flatten() for value, _ in self.seen[layer]]
        found = torch.cat(blocks)
        return float(found[found.isfinite()].mean())

    def share(self, layer: int, threshold: float) -> float:
        """Of a row's tokens, what `choose` would keep, on average over the batches."""
        shares = []
        for value, row in self.seen[layer]:
            above = (value >= threshold).to(row.required.device)
            shares.append(row.count(self.config, self.config.keep, above) / value.shape[1])
        return sum(shares) / len(shares)

    def fit_budget(self, thresholds: list[float]) -> list[float]:
        """All moved alike, by the least that keeps no more than `keep` on average."""
        total = sum(len(run) for run in self.runs)

        def moved(by: float) -> list[float]:
            return [min(max(t + by, 0.0), _HIGHEST) for t in thresholds]

        def over(by: float) -> bool:
            pairs = zip(self.runs, moved(by), strict=True)
            return sum(len(r) * self.share(r[0], t) for r, t in pairs) > self.config.keep * total

        low, high = -_HIGHEST - max(thresholds), _HIGHEST - min(thresholds)
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if over(middle) else (low, middle)
        return moved(high)

    def differences(self, thresholds: list[float]) -> tuple[float, list[float], list[float]]:
        """Loss; for each run loss per share of tokens when its threshold drops some more, and the
        change of threshold that did it.
        """
        loss = self.loss(thresholds)
        seen, costs, steps = self.seen, [], []
        for number, run in enumerate(self.runs):
            self.seen = seen
            own = thresholds[number]
            before = self.share(run[0], own)
            step = next(
                (
                    d / 100
                    for d in range(1, 101)
                    if self.share(run[0], own + d / 100) < before - _STEP
                ),
                _HIGHEST - own,
            )
            saved = before - self.share(run[0], own + step)
            others = list(thresholds)
            others[number] = own + step
            more = self.loss(others) - loss if saved > 0 else 0.0
            costs.append(more / (saved * len(run)) if saved > 0 else 0.0)
            steps.append(step)
        self.seen = seen
        return loss, costs, steps


def _targets(batch: Mapping[str, Tensor]) -> Tensor:
    """Next tokens (B, S), -100 where there is none."""
    labels = batch.get("labels")
    if labels is None:
        labels = batch["input_ids"]
        if "attention_mask" in batch:
            labels = labels.masked_fill(batch["attention_mask"] == 0, -100)
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)


def write_thresholds(path: str | Path, thresholds: Mapping[int, float]) -> None:
    """JSON, one entry a layer."""
    text = json.dumps({str(layer): t for layer, t in sorted(thresholds.items())}, indent=1)
    Path(path).write_text(text + "\n", "utf-8")


def read_thresholds(path: str | Path) -> dict[int, float]:
    """What `write_thresholds` wrote. ValueError where the file is missing or is something else."""
    try:
        found = json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read thresholds {path}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"thresholds {path} is not JSON: {error}") from error
    if not isinstance(found, dict) or not found:
        raise ValueError(f"thresholds {path} must map layers to numbers, such as {{'8': 0.3}}")
    for layer, value in found.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not layer.isdecimal() or not number or not math.isfinite(value):
            raise ValueError(
                f"thresholds {path}: {layer!r}: {value!r} is no layer with a finite number"
            )
    return {int(layer): float(value) for layer, value in found.items()}
