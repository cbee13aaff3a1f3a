"""Recipe part `optimizer`: how gradients become steps."""

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, WrapValidator, model_validator

from mnemic.train.recipe.base import KindShorthand, Part


def _either(what: str) -> WrapValidator:
    """One sentence for a value that no arm of a union takes, in place of one for each arm."""

    def check(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise ValueError(f"{value!r} is not {what}") from None

    return WrapValidator(check)


Rank = Annotated[
    Annotated[int, Field(ge=1)] | Annotated[float, Field(gt=0, lt=1)],
    _either("a whole number from 1, or a share of the smaller dimension between 0 and 1"),
]
Scale = Annotated[
    Annotated[float, Field(gt=0)] | Literal["auto"], _either("auto, or a number above 0")
]


class _Adam(Part):
    lr: float = Field(1e-4, gt=0)
    """Peak learning rate."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the first moment."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """Decay of the second moment."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled decay of matrices; vectors (biases, norms) have none."""


class AdamW(_Adam):
    """AdamW (arXiv 1711.05101), torch's fused kernel; two fp32-or-weight-dtype moments for each
    weight.
    """

    kind: Literal["adamw"] = "adamw"


class AdamW8bit(_Adam):
    """AdamW with moments of one byte each (arXiv 2110.02861), by bitsandbytes; tensors below 4,096
    elements keep fp32 ones.
    """

    kind: Literal["adamw8bit"] = "adamw8bit"


class Sgd(Part):
    """Stochastic gradient descent: no state without momentum, so the least memory of all."""

    kind: Literal["sgd"] = "sgd"
    lr: float = Field(1e-2, gt=0)
    """Peak learning rate."""
    momentum: float = Field(0.0, ge=0, lt=1)
    """Heavy-ball momentum; above 0 it keeps one buffer for each weight."""
    weight_decay: float = Field(0.0, ge=0)
    """L2 penalty on matrices; vectors have none."""


class Adafactor(Part):
    """Adafactor (arXiv 1804.04235), torch's: a second moment for each row and column."""

    kind: Literal["adafactor"] = "adafactor"
    lr: float = Field(1e-2, gt=0)
    """Peak rate relative to a tensor's root mean square; never above 1 / sqrt(step)."""
    beta2_decay: float = Field(-0.8, le=0)
    """The second moment's decay at step t is 1 - t ** beta2_decay."""
    clip_threshold: float = Field(1.0, ge=1)
    """Largest root mean square of a tensor's update, before the rate."""
    least_scale: float = Field(1e-3, ge=0)
    """Least root mean square that a tensor counts as having."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled decay of matrices; vectors have none."""


class _ByRole(_Adam):
    rest_lr: float | None = Field(None, gt=0)
    """Peak learning rate of AdamW, which has all but the matrices; null for `lr`."""
    min_coverage: float = Field(0.5, ge=0, le=1)
    """Share of the parameters other than embeddings and head that must be matrices."""


class Muon(_ByRole):
    """Muon (arXiv 2502.16982) by pytorch_optimizer: the momentum of matrices, orthogonalised; AdamW
    for embeddings, head, norms and vectors.
    """

    kind: Literal["muon"] = "muon"
    momentum: float = Field(0.95, ge=0, lt=1)
    """Decay of the momentum of matrices."""
    nesterov: bool = True
    """Look one step ahead along the momentum."""
    ns_steps: int = Field(5, ge=1)
    """Newton-Schulz iterations."""
    match_rms_adamw: bool = True
    """Scale an update by 0.2 sqrt(max(m, n)), so that `lr` means what it means for AdamW; false for
    sqrt(max(1, m / n)), whose rates are some 20 times larger.
    """


class GaLore(_ByRole):
    """GaLore (arXiv 2403.03507) by pytorch_optimizer: AdamW in the leading singular directions of
    each matrix's gradient; plain AdamW for embeddings, head, norms and vectors.
    """

    kind: Literal["galore"] = "galore"
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate; matrices move by `scale` times it."""
    rank: Rank = 0.25
    """Rank of the projection, or share of the smaller dimension."""
    scale: float = Field(0.25, gt=0)
    """Factor alpha of the low-rank update."""
    update_proj_gap: int = Field(200, ge=1)
    """Steps between singular value decompositions."""


class ParameterPattern(Part):
    """Settings of the parameters that `match`; what is not set is as in the optimizer."""

    match: str
    """Glob over parameter names such as `*.mlp.*`, or `role:matrix`, `role:experts`,
    `role:embedding`, `role:head`, `role:vector`, `role:other`.
    """
    rule: Literal["apollo", "adamw", "adamw8bit"] | None = None
    """Low-rank, AdamW with fp32 moments, or AdamW with one-byte moments."""
    lr: float | None = Field(None, gt=0)
    """Peak learning rate."""
    weight_decay: float | None = Field(None, ge=0)
    """Decoupled decay."""
    rank: Rank | None = None
    """Rank, or share of the smaller dimension."""
    scale: Scale | None = None
    """As in the optimizer."""

    def settings(self) -> dict[str, Any]:
        """What is set; a scale of its own takes the place of the optimizer's `scale_sq`."""
        given = {k: v for k, v in self.model_dump().items() if v is not None}
        return {**given, "scale_sq": None} if self.scale is not None else given


class _Apollo(_Adam):
    lr: float = Field(1e-3, gt=0)
    """Peak learning rate; with `scale: auto` it means what it means for AdamW."""
    scale: Scale = "auto"
    """Factor alpha of the low-rank update; auto is sqrt(min(m, n) / rank) for each matrix."""
    scale_sq: float | None = Field(None, gt=0)
    """Alpha squared: what apollo-torch and the HF Trainer call `scale`. Needs `scale: auto`."""
    update_proj_gap: int = Field(200, ge=1)
    """Steps between new random projections."""
    proj: Literal["sparse", "gaussian"] = "sparse"
    """Signed bucket sums, one pass whatever the rank; or the paper's dense normal matrix."""
    proj_entries: int = Field(1, ge=1)
    """Buckets of a row in a sparse projection; more lower its variance."""
    gamma: float | None = Field(1.01, gt=1)
    """Largest growth of an update's norm from step to step; null for no limiter."""
    rounding: Literal["stochastic", "nearest"] = "stochastic"
    """Rounding of bf16 weights; without effect on fp32 ones."""
    rest: Literal["adamw", "adamw8bit"] = "adamw"
    """Rule of embeddings, head, norms and vectors: fp32 moments, or one byte each."""
    rest_lr: float | None = Field(None, gt=0)
    """Peak learning rate of those; null for `lr`."""
    patterns: list[ParameterPattern] = Field(default_factory=list)
    """Exceptions by name or role; the first that matches wins, one that takes nothing is an error.
    """
    min_coverage: float = Field(0.5, ge=0, le=1)
    """Share of the parameters other than embeddings and head that must get the low-rank rule."""
    cache_projection: bool = False
    """Keep gaussian projections between steps: faster, min(m, n) * rank more numbers a matrix."""
    compile: bool = False
    """Write the weights by torch.compile: needs a C++ compiler, takes seconds at the start."""

    @model_validator(mode="after")
    def _check(self) -> "_Apollo":
        if self.scale_sq is not None and self.scale != "auto":
            raise ValueError(
                f"scale={self.scale} and scale_sq={self.scale_sq} both give alpha; keep one"
            )
        if self.proj == "gaussian" and self.proj_entries != 1:
            raise ValueError(
                f"proj_entries={self.proj_entries} is for proj=sparse; a gaussian projection is "
                "dense: leave it at 1"
            )
        return self


class Apollo(_Apollo):
    """APOLLO (arXiv 2412.05270): AdamW's quality from moments of a low-rank projection."""

    kind: Literal["apollo"] = "apollo"
    rank: Rank = 0.25
    """Rank of the projection, or share of the smaller dimension."""
    scale_type: Literal["channel", "tensor"] = "channel"
    """One scale for each channel, or for the whole matrix."""


class ApolloMini(_Apollo):
    """APOLLO-Mini: rank 1 and one scale a matrix, so as little state as SGD."""

    kind: Literal["apollo_mini"] = "apollo_mini"


Optimizer = Annotated[
    AdamW | AdamW8bit | Sgd | Adafactor | Muon | GaLore | Apollo | ApolloMini,
    Field(discriminator="kind"),
    KindShorthand,
]
