"""The recipe's token sparsity on a model, and the dense probe that says what it costs."""

import importlib
import logging
from pathlib import Path
from typing import Any

import torch

from mnemic.models.tokens.config import TokensConfig
from mnemic.models.tokens.sparsity import TokenSparsity
from mnemic.train.data.collate import Batch
from mnemic.train.errors import UserError
from mnemic.train.objectives.tokens import base_of
from mnemic.train.recipe.recipe import Recipe
from mnemic.train.recipe.tokens import NoTokens, Protect

log = logging.getLogger("mnemic")

_OWN = ("kind", "score_path", "thresholds", "probe_every")


def install_tokens(
    recipe: Recipe, model: Any, tokenizer: Any
) -> tuple[TokenSparsity, int | None] | None:
    """Hooks on the recipe's model, adapters and exact savings included, and how often to probe;
    None for `tokens: none`.
    """
    part = recipe.tokens
    if isinstance(part, NoTokens):
        return None
    config = to_config(part)
    try:
        score = _score(part, model, tokenizer)
        streamer = getattr(base_of(model), "streamer", None)
        sparsity = TokenSparsity(
            model, config, score=score, seed=recipe.loop.seed, apart=streamer is not None
        )
        if streamer is not None:
            streamer.sparsity = sparsity
    except ValueError as error:
        raise UserError(f"tokens: {error}") from error
    first, last = sparsity.sparse[0], sparsity.sparse[-1]
    log.info(
        "tokens: %s, layers %d to %d of %d on %.0f %% of each row, chosen by %s%s",
        part.kind, first, last, len(sparsity.layers), 100 * part.keep, part.score,
        "; supervised tokens always kept" if part.protect else "",
    )  # fmt: skip
    if part.grad == "selected" and part.layers == "all" and recipe.loop.gradient_checkpointing:
        log.warning(
            "loop.gradient_checkpointing has no effect with tokens.grad=selected, which keeps "
            "layer inputs and recomputes kept tokens"
        )
    return sparsity, part.probe_every


def to_config(part: Protect) -> TokensConfig:
    values = {k: v for k, v in part.model_dump().items() if k not in _OWN}
    if part.thresholds:
        from mnemic.models.tokens.thresholds import read_thresholds

        values["thresholds"] = read_thresholds(Path(part.thresholds).expanduser())
    return TokensConfig(**values)


def _score(part: Protect, model: Any, tokenizer: Any) -> Any:
    """A score that is more than a formula; None for the others."""
    if part.score == "model":
        from mnemic.models.load import LoadError, load_causal_lm
        from mnemic.models.tokens.small_model import ModelScore

        assert part.score_path
        try:
            small = load_causal_lm(part.score_path, dtype="bf16")
        except LoadError as error:
            raise ValueError(f"score_path: {error}") from error
        if small.config.get_text_config().vocab_size < len(tokenizer):
            raise ValueError(
                f"score_path: {part.score_path} knows {small.config.get_text_config().vocab_size} "
                f"tokens and the model's tokenizer {len(tokenizer)}; give one with the same"
            )
        return ModelScore(small)
    if part.score == "predictor":
        from mnemic.models.tokens.predictor import load_predictors

        assert part.score_path
        return load_predictors(Path(part.score_path).expanduser(), model)
    if ":" in part.score:
        name, _, attribute = part.score.partition(":")
        try:
            return getattr(importlib.import_module(name), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"score={part.score}: {error}") from error
    return None


def dense_probe(trainer: Any, sparsity: TokenSparsity, batch: Batch) -> dict[str, float]:
    """Loss and gradient of one micro-batch with all tokens, beside those that training has: losses
    per trained token, and the cosine of the two gradients. Two more forwards and backwards; two
    gradients are held.
    """
    model = trainer.module
    params = [p for p in model.parameters() if p.requires_grad]
    batch = batch.to(trainer.accelerator.device)
    losses, gradients = [], []
    for paused in (False, True):
        sparsity.paused = paused
        try:
            with trainer.autocast():
                loss, _ = trainer.objective.loss(model, batch)
            gradients.append(torch.autograd.grad(loss, params, allow_unused=True))
        finally:
            sparsity.paused = False
        losses.append(float(loss.detach()) / batch.weight)
    dot, first, second = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    for x, y in zip(*gradients, strict=True):
        if x is not None and y is not None:
            dot += (x.float() * y.float()).sum().double().cpu()
        first += 0 if x is None else x.float().pow(2).sum().double().cpu()
        second += 0 if y is None else y.float().pow(2).sum().double().cpu()
    return {
        "tokens/probe_loss": losses[0],
        "tokens/probe_dense_loss": losses[1],
        "tokens/probe_cosine": float(dot / (first * second).sqrt().clamp_min(1e-30)),
    }
