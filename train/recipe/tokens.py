"""Recipe part `tokens`: which tokens the layers run on, a preset a kind."""

from copy import copy
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mnemic.train.recipe.base import KindShorthand, Part

Scope = Literal["layer", "attention"]
Attend = Literal["all", "kept"]
LossOn = Literal["kept", "all"]
Grad = Literal["all", "selected"]
Layers = Literal["late", "half", "middle", "all"] | tuple[int, int]
_SCORES = ("attention", "model", "predictor", "lemo", "innovation", "norm", "random", "window")


class NoTokens(Part):
    """Every layer runs on every token."""

    kind: Literal["none"] = "none"


class Protect(Part):
    """Ours: the forward is exact, and gradients go through supervised tokens and those that they
    attended to most. For long prompts with short answers.
    """

    kind: Literal["protect"] = "protect"
    keep: float = Field(0.25, gt=0, le=1)
    """Share of a row's tokens that are kept; more where more are protected."""
    layers: Layers = "all"
    """Sparse layers: `late` (from the second quarter on), `half` (second half but the last),
    `middle` (all but first and last), `all`, or [first, last) counted from 0.
    """
    scope: Scope = "layer"
    """Whole layers, or their attention only (LeMo's)."""
    score: str = "attention"
    """What decides: attention (that supervised tokens pay), lemo, innovation, norm, random, window,
    model and predictor (which need `score_path`), or `package.module:function`.
    """
    score_path: str | None = None
    """For `model`: folder of a small model with the same tokenizer; for `predictor`: file of
    scripts/train_predictors.py.
    """
    share: int | None = Field(None, ge=1)
    """Layers that follow one another and have one keep set; null: all of them."""
    block: int = Field(64, ge=1)
    """Tokens that are chosen together."""
    sinks: int = Field(1, ge=0)
    """Blocks at the beginning of a row that are always kept."""
    recent: int = Field(1, ge=0)
    """Blocks at the end of a row that are always kept."""
    protect: bool = True
    """Always keep supervised tokens: those that are learned, and those that predict them."""
    attend: Attend = "all"
    """With grad=all. kept: dropped tokens are gone, as LeMo's and random-LTD's are. all: they are
    not worked on and can still be attended to, by keys and values from where they were left.
    """
    loss: LossOn = "kept"
    """Over supervised tokens that were kept, standing for all of them; or over all."""
    grad: Grad = "selected"
    """selected: layers run on all tokens and are recomputed for kept ones, through which gradients
    go: loss and logits are exact. all: layers run on kept tokens only, which changes the forward.
    """
    ramp: float = Field(0.0, ge=0, le=1)
    """Share of the run in which `keep` rises to 1."""
    dense_end: float = Field(0.0, ge=0, lt=1)
    """Share of the run, at its end, that is dense."""
    mlp_backward_keep: float | None = Field(None, gt=0, le=1)
    """Share of a frozen MLP's neurons that have a backward (LeMo); null: all."""
    thresholds: str | None = None
    """File of scripts/profile_thresholds.py: each layer keeps blocks that score above its own
    threshold, in place of `keep`.
    """
    probe_every: int | None = Field(None, ge=1)
    """Steps between dense probes: dense loss and gradient cosine of one micro-batch."""

    @model_validator(mode="after")
    def _check(self) -> Any:
        if ":" not in self.score and self.score not in _SCORES:
            raise ValueError(
                f"score={self.score!r} is not one of {', '.join(_SCORES)}, nor package.module:name"
            )
        if self.score in ("model", "predictor") and not self.score_path:
            raise ValueError(f"score={self.score} needs score_path")
        if self.score_path and self.score not in ("model", "predictor"):
            raise ValueError(f"score_path has no effect with score={self.score}; set it to null")
        if self.ramp + self.dense_end > 1:
            raise ValueError(
                f"ramp={self.ramp} and dense_end={self.dense_end} are more than the whole run"
            )
        if self.scope == "attention" and self.attend == "all":
            raise ValueError("scope=attention hides dropped tokens; set attend=kept")
        if self.grad == "selected" and self.scope == "attention":
            raise ValueError("grad=selected is for whole layers; set scope=layer, or grad=all")
        if self.grad == "selected" and self.share is not None:
            raise ValueError("grad=selected has one set for all layers; set share to null")
        return self


def _but(name: str, default: Any) -> Any:
    """A field of `Protect`, with its limits and its description, and another default."""
    field = copy(Protect.model_fields[name])
    field.default = default
    return field


class Drop(Protect):
    """Layers from the second quarter on run on kept tokens only, supervised ones always among them:
    the shortest step, and the model sees less in training than when it is used.
    """

    kind: Literal["drop"] = "drop"  # type: ignore[assignment]
    keep: float = _but("keep", 0.5)
    layers: Layers = _but("layers", "late")
    attend: Attend = _but("attend", "kept")
    grad: Grad = _but("grad", "all")


class Lemo(Protect):
    """LeMo's end-to-end runs (arXiv 2501.09767): attention only, a set for each layer of the late
    half, 40 %, 20 % of the neurons in the MLP's backward, loss on everything.
    """

    kind: Literal["lemo"] = "lemo"  # type: ignore[assignment]
    keep: float = _but("keep", 0.4)
    layers: Layers = _but("layers", "half")
    scope: Scope = _but("scope", "attention")
    score: str = _but("score", "lemo")
    share: int | None = _but("share", 1)
    sinks: int = _but("sinks", 0)
    recent: int = _but("recent", 0)
    protect: bool = _but("protect", False)
    attend: Attend = _but("attend", "kept")
    loss: LossOn = _but("loss", "all")
    grad: Grad = _but("grad", "all")
    mlp_backward_keep: float | None = _but("mlp_backward_keep", 0.2)


class TokenTune(Protect):
    """TokenTune (EMNLP 2024): exact forward, gradients through supervised and random tokens."""

    kind: Literal["token_tune"] = "token_tune"  # type: ignore[assignment]
    keep: float = _but("keep", 0.5)
    score: str = _but("score", "random")
    block: int = _but("block", 1)
    sinks: int = _but("sinks", 0)
    recent: int = _but("recent", 0)


class RandomLtd(Protect):
    """random-LTD (arXiv 2211.11586): each middle layer has its own random tokens, more and more of
    them, and the run ends dense.
    """

    kind: Literal["random_ltd"] = "random_ltd"  # type: ignore[assignment]
    keep: float = _but("keep", 0.5)
    layers: Layers = _but("layers", "middle")
    score: str = _but("score", "random")
    share: int | None = _but("share", 1)
    block: int = _but("block", 1)
    sinks: int = _but("sinks", 0)
    recent: int = _but("recent", 0)
    protect: bool = _but("protect", False)
    attend: Attend = _but("attend", "kept")
    loss: LossOn = _but("loss", "all")
    grad: Grad = _but("grad", "all")
    ramp: float = _but("ramp", 0.9)
    dense_end: float = _but("dense_end", 0.1)


Tokens = Annotated[
    NoTokens | Protect | Drop | Lemo | TokenTune | RandomLtd,
    Field(discriminator="kind"),
    KindShorthand,
]

_ATTENTION_ONLY = ("q_proj", "k_proj", "v_proj", "o_proj")


def check_tokens(tokens: Any, adapters: Any, objective: Any, update: Any, loop: Any) -> list[str]:
    """Which token sparsity goes with what else: a sentence for what does not."""
    if isinstance(tokens, NoTokens) or objective.kind == "grpo":
        return []  # refused by check_memory
    problems = []
    if update.kind == "streamed":
        problems += _streamed(tokens)
    everything = objective.kind == "lm" or objective.loss_on == "all"
    if tokens.protect and everything:
        key = "kind=lm" if objective.kind == "lm" else "loss_on=all"
        problems.append(
            f"tokens.protect=true keeps every supervised token, and with objective.{key} that is "
            "every token, so nothing would be dropped; set tokens.protect=false, or tokens=none"
        )
    if tokens.mlp_backward_keep is not None:
        targets = getattr(adapters, "target_modules", None)
        if targets is None or not set([targets] if isinstance(targets, str) else targets) <= set(
            _ATTENTION_ONLY
        ):
            problems.append(
                f"tokens.mlp_backward_keep={tokens.mlp_backward_keep} approximates the backward of "
                "frozen MLPs; set adapters=lora with adapters.target_modules="
                f"[{', '.join(_ATTENTION_ONLY)}], or tokens.mlp_backward_keep to null"
            )
        if loop.mlp_tile != "none":
            problems.append("tokens.mlp_backward_keep runs MLPs whole; set loop.mlp_tile=none")
    if loop.sequence_chunk and (tokens.attend == "all" or tokens.scope == "attention"):
        key = "scope=attention" if tokens.scope == "attention" else "attend=all"
        key = "grad=selected" if tokens.grad == "selected" else key
        problems.append(
            f"loop.sequence_chunk={loop.sequence_chunk} runs a layer in pieces, which "
            f"tokens.{key} does not; set it to null"
        )
    return problems


def _streamed(tokens: Any) -> list[str]:
    """A streamed model runs layer by layer: all rows forward, then all rows backward."""
    problems = []
    if tokens.grad != "selected":
        problems.append(
            f"tokens.kind={tokens.kind} shortens what is passed from layer to layer, and "
            "update.kind=streamed runs layers one by one; set tokens.kind=protect or token_tune "
            "(tokens.grad=selected), or update.kind=in_backward"
        )
    elif not tokens.protect and tokens.loss == "kept":
        problems.append(
            "tokens.protect=false with tokens.loss=kept takes tokens out of the loss, which "
            "update.kind=streamed does not; set tokens.loss=all, or update.kind=in_backward"
        )
    elif tokens.mlp_backward_keep is not None:
        problems.append(
            "tokens.mlp_backward_keep is not there with update.kind=streamed; set it to null, or "
            "update.kind=in_backward"
        )
    if tokens.probe_every is not None:
        problems.append(
            "tokens.probe_every compares two gradients of the whole model, which "
            "update.kind=streamed never holds; set it to null"
        )
    return problems
