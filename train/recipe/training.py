"""Recipe parts that say how to train: `objective`, `update`, `loop`, `evaluation`, `track`."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from mnemic.train.recipe.base import KindShorthand, Part
from mnemic.train.recipe.data import Data
from mnemic.train.recipe.distill import DistillObjective
from mnemic.train.recipe.memory import GrpoObjective, with_preset
from mnemic.train.recipe.offload import Size, parse_size
from mnemic.train.recipe.sft import SftObjective


class LmObjective(Part):
    """Next-token prediction on text packed into rows of equal length."""

    kind: Literal["lm"] = "lm"
    seq_len: int = Field(512, ge=2)
    """Tokens in a packed row."""


Objective = Annotated[
    LmObjective | SftObjective | DistillObjective | GrpoObjective,
    Field(discriminator="kind"),
    BeforeValidator(with_preset),
    KindShorthand,
]


class PlainUpdate(Part):
    """Whole backward first, then one optimizer step."""

    kind: Literal["plain"] = "plain"
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    """Global-norm clipping; null turns it off (the norm is logged all the same)."""


class InBackwardUpdate(Part):
    """The optimizer runs inside the backward, as each gradient is ready, and frees it: no more than
    a few layers' gradients are ever held. Several micro-batches still need all of them at once.
    """

    kind: Literal["in_backward"] = "in_backward"
    clip: Literal["none", "layer", "previous_norm"] = "none"
    """none; each tensor by its own norm; or all by the global norm of the step before, because that
    of this step is known only when the weights have changed.
    """
    max_grad_norm: float | None = Field(default=None, gt=0)
    """The norm to clip to, with `clip` other than none."""

    @model_validator(mode="after")
    def _check(self) -> "InBackwardUpdate":
        if self.clip == "none" and self.max_grad_norm is not None:
            raise ValueError(
                f"max_grad_norm={self.max_grad_norm} clips by the global norm, which in_backward "
                "does not know in time; set clip to layer or previous_norm, or kind to plain"
            )
        if self.clip != "none" and self.max_grad_norm is None:
            raise ValueError(f"clip={self.clip} needs max_grad_norm, such as 1.0")
        return self


class StreamedUpdate(Part):
    """One layer in memory at a time, read from `offload`; each gradient is used inside the backward
    and freed. Several micro-batches run layer by layer, so accumulation costs no gradient memory.
    """

    kind: Literal["streamed"] = "streamed"
    clip: Literal["none", "layer", "previous_norm", "speculative", "exact_spill"] = "none"
    """none; each tensor by its own norm; all by the norm of the step before; speculative: step
    unclipped, and take the step back and do it again where the norm was too large; exact_spill:
    write gradients to disk, step when their norm is known. The last two are exact.
    """
    max_grad_norm: float | None = Field(default=None, gt=0)
    """The norm to clip to, with `clip` other than none."""

    @model_validator(mode="after")
    def _check(self) -> "StreamedUpdate":
        if self.clip == "none" and self.max_grad_norm is not None:
            raise ValueError(
                f"max_grad_norm={self.max_grad_norm} has no effect with clip=none; set clip to "
                "speculative or exact_spill (exact), layer or previous_norm"
            )
        if self.clip != "none" and self.max_grad_norm is None:
            raise ValueError(f"clip={self.clip} needs max_grad_norm, such as 1.0")
        return self


def _plain_unless_said(value: Any) -> Any:
    return {"kind": "plain", **value} if isinstance(value, dict) else value


Update = Annotated[
    PlainUpdate | InBackwardUpdate | StreamedUpdate,
    Field(discriminator="kind"),
    # `update: {max_grad_norm: 0.5}` is the plain update's.
    BeforeValidator(_plain_unless_said),
    KindShorthand,
]


class Schedule(Part):
    """Learning rate over optimizer steps, as a factor of `optimizer.lr`."""

    kind: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    """After warm-up: flat; a line to the end; half a cosine; or flat, then a line over `decay`."""
    warmup: float = Field(default=0.0, ge=0)
    """Linear warm-up: below 1 a share of all steps, from 1 on a number of steps."""
    decay: float = Field(default=0.2, gt=0, le=1)
    """Share of all steps in which `wsd` decays."""
    min_ratio: float = Field(default=0.0, ge=0, le=1)
    """Factor at the last step."""


def _check_budget(value: Any) -> Any:
    """`auto`, or a size as it was written."""
    if value is None or value == "auto":
        return value
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError(f"{value!r} is not a size; write such as 512MiB, 2GiB, bytes or auto")
    if parse_size(str(value)) <= 0:
        raise ValueError(f"{value!r} is no memory at all; write such as 512MiB, 2GiB or auto")
    return str(value)


class Loop(Part):
    """How long, how much at once, and what is kept."""

    steps: int | None = Field(None, ge=1)
    """Optimizer steps. Give this or `epochs`."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the data, counted before training. Give this or `steps`."""
    batch_size: int = Field(8, ge=1)
    """Rows for each optimizer step, over all devices: what the result depends on."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Rows in one forward on one device; smaller takes less memory for the same result. null: all
    at once.
    """
    seed: int = 0
    """Seed of initial weights, data order and dropout."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs matrix products in bf16 by autocast, whatever `model.dtype` holds the weights in.
    """
    device: Literal["auto", "cpu"] = "auto"
    """auto takes an accelerator when there is one."""
    schedule: Annotated[Schedule, KindShorthand] = Schedule()
    """Learning rate over steps."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward: less memory, about a third more time, the same result.
    """
    checkpoint_every: int = Field(1, ge=1)
    """With `gradient_checkpointing`: recompute every n-th layer only."""
    sequence_chunk: int | None = Field(None, ge=16)
    """Run each layer forward and backward in chunks of so many tokens (multiples of 64 are fast):
    no more than a chunk of a layer is ever held, and layer inputs. The same result to round-off.
    """
    mlp_tile: Literal["none", "auto"] | Annotated[int, Field(ge=16)] = "none"
    """Run each MLP in tiles of so many tokens, made again in the backward; auto tiles rows past
    8,192 tokens. The same result to round-off.
    """
    loss: Literal["auto", "logits", "chunked"] = "auto"
    """How the loss is had from the last hidden states: with all logits, without ever making them
    all, or by their size. The same result to round-off.
    """
    memory_budget: Annotated[str | None, BeforeValidator(_check_budget)] = None
    """Bytes that the whole process may take, such as `8GiB`, or the accelerator's where there is
    one; auto: what is free. A run changes update, offload, batches and recomputation until its
    predicted peak fits (docs/plan.md). null: as the recipe says.
    """
    save_every: int = Field(100, ge=1)
    """Steps between checkpoints; one is always written at the end and on SIGINT or SIGTERM."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints kept; the best one is kept as well."""
    resume: str = "auto"
    """auto: go on from the run folder's newest checkpoint; never: refuse a used folder; or a
    checkpoint folder.
    """

    @model_validator(mode="after")
    def _check(self) -> "Loop":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs; set the other to null")
        if self.checkpoint_every > 1 and not self.gradient_checkpointing:
            raise ValueError(
                f"checkpoint_every={self.checkpoint_every} has no effect without "
                "gradient_checkpointing: true"
            )
        if self.sequence_chunk and self.checkpoint_every > 1:
            raise ValueError(
                f"sequence_chunk={self.sequence_chunk} recomputes every layer; set "
                "checkpoint_every to 1, or sequence_chunk to null"
            )
        return self


class Evaluation(Part):
    """Measures on held-out rows during the run."""

    data: Data | None = None
    """Rows to evaluate on. Give this or `holdout`."""
    holdout: float | None = Field(None, gt=0, lt=1)
    """Share of `data` kept out of training: the end of a text, or every n-th row. Give this or
    `data`.
    """
    every: int = Field(100, ge=1)
    """Steps between evaluations; one is always made at the end."""
    at_start: bool = True
    """Also evaluate the untrained model (step 0)."""
    batch_size: int = Field(16, ge=1)
    """Rows in one forward or one generation."""
    max_rows: int | None = Field(None, ge=1)
    """Evaluate on the first rows only."""
    exact_match: bool = False
    """Generate greedily from each prompt and compare the text with the reference (objective `sft`).
    """
    max_new_tokens: int = Field(64, ge=1)
    """Longest generation, tokens."""
    play: int | None = Field(None, ge=1)
    """Play so many held-out episodes greedily and report `eval/r1` (needs `memory`); objective grpo
    always does, all of them with null.
    """
    metric: Literal["eval/loss", "eval/exact_match", "eval/r1"] = "eval/loss"
    """What `patience` and the best checkpoint go by."""
    patience: int | None = Field(None, ge=1)
    """Stop after this many evaluations in a row without a better `metric`."""
    export_best: bool = False
    """Export the best checkpoint, not the last, at the end."""

    @model_validator(mode="after")
    def _check(self) -> "Evaluation":
        if (self.data is None) == (self.holdout is None):
            raise ValueError("give exactly one of data and holdout; set the other to null")
        if self.metric == "eval/exact_match" and not self.exact_match:
            raise ValueError("metric=eval/exact_match needs exact_match: true")
        return self


class NoTracking(Part):
    """Only the run folder's own files."""

    kind: Literal["none"] = "none"


class WandbTracking(Part):
    """Weights & Biases (extra `track`). metrics.jsonl is written as well and holds the
    same rows.
    """

    kind: Literal["wandb"] = "wandb"
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online with an API key, else offline (upload later with `wandb sync`)."""
    project: str = "mnemic"
    """Project name."""
    entity: str | None = None
    """User or team; null takes the account's default."""
    tags: list[str] = Field(default_factory=list)
    """Tags of the run."""
    plan: bool = True
    """Put what `mnemic plan` says of the run into its summary, to stand beside what was measured.
    Planned once, in a process of its own that ends before training begins; takes seconds. For one
    process, and a model that lies on this machine."""
    artifacts: Literal["none", "adapters", "all"] = "adapters"
    """Which results become artifacts of the run: adapters (megabytes), or full models as well.
    Offline they are copied into the run folder, for `wandb sync` to upload."""
    artifact_limit: Size = 2 << 30
    """A result of more bytes, such as `2GiB`, is not made an artifact; the run warns."""


Track = Annotated[NoTracking | WandbTracking, Field(discriminator="kind"), KindShorthand]
