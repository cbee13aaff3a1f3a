"""Recipe part of objective `distill`: knowledge distillation from a local teacher, after GKD
(arXiv 2306.13649).
"""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from mnemic.train.recipe.base import KindShorthand, Part
from mnemic.train.recipe.model import DType
from mnemic.train.recipe.sft import SftObjective

if TYPE_CHECKING:
    from mnemic.train.recipe.recipe import Recipe

_BETA = 0.5


class PretrainedTeacher(Part):
    """A causal language model from the Hugging Face hub or from a local folder, frozen."""

    kind: Literal["pretrained"] = "pretrained"
    path: str
    """Hub name or a folder that `from_pretrained` loads, with its tokenizer."""
    revision: str | None = None
    """Branch, tag or commit on the hub; null takes the default branch."""
    dtype: DType = "bf16"
    """Type the weights are held in."""
    adapters: str | None = None
    """Folder of a PEFT adapter that is put on the teacher."""
    trust_remote_code: bool = False
    """Run Python code shipped with the model. Only for sources you trust."""


class SmolLM2Teacher(Part):
    """SmolLM2-135M-Instruct, as `model.kind: smollm2-135m`, frozen."""

    kind: Literal["smollm2-135m"] = "smollm2-135m"
    dtype: DType = "bf16"
    """Type the weights are held in."""
    adapters: str | None = None
    """Folder of a PEFT adapter that is put on the teacher."""


Teacher = Annotated[PretrainedTeacher | SmolLM2Teacher, Field(discriminator="kind"), KindShorthand]


class DistillObjective(SftObjective):
    """Match a teacher's next-token distributions at the trained tokens of `sft`'s rows, over the
    whole vocabulary, which both must share.
    """

    kind: Literal["distill"] = "distill"  # type: ignore[assignment]
    teacher: Teacher
    """Whose distributions are learned."""
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """forward_kl: KL(teacher || student), covers all that the teacher says; reverse_kl:
    KL(student || teacher), keeps to what the teacher says most; jsd: between the two, by
    `jsd_beta`.
    """
    jsd_beta: float = Field(_BETA, gt=0, lt=1)
    """Weight b of the teacher in the mixture m: b KL(teacher || m) + (1 - b) KL(student || m)."""
    temperature: float = Field(1.0, gt=0)
    """Divides both models' logits before the divergence; the loss is not multiplied by its square.
    Samples are drawn at 1.
    """
    hard_weight: float = Field(0.0, ge=0, le=1)
    """Weight w of the cross-entropy of the rows' own tokens: (1 - w) divergence + w cross-entropy.
    Sampled completions have the divergence alone.
    """
    on_policy: float = Field(0.0, ge=0, le=1)
    """Probability with which a row's completion is replaced by one that the student samples, which
    the teacher then judges.
    """
    max_new_tokens: int = Field(64, ge=1)
    """Longest sampled completion, tokens; with its prompt at most `max_length`."""

    @model_validator(mode="after")
    def _check(self) -> "DistillObjective":
        if self.divergence != "jsd" and self.jsd_beta != _BETA:
            raise ValueError(
                f"jsd_beta={self.jsd_beta:g} has no effect with divergence={self.divergence}; set "
                "divergence=jsd, or remove it"
            )
        if self.hard_weight == 1:
            raise ValueError("hard_weight=1 leaves the teacher nothing to say; set kind=sft")
        if self.on_policy and self.packing:
            raise ValueError(
                f"on_policy={self.on_policy:g} replaces the completion of a row, and packed rows "
                "are several; set packing=false"
            )
        if self.on_policy and self.loss_on != "completion":
            raise ValueError(
                f"on_policy={self.on_policy:g} samples completions; set loss_on=completion, not "
                f"{self.loss_on}"
            )
        return self


def check_distill(recipe: "Recipe") -> list[str]:
    """One sentence for each part that objective `distill` does not go with."""
    if not isinstance(recipe.objective, DistillObjective):
        return []
    found = []
    if recipe.update.kind == "streamed":
        found.append(
            "update.kind=streamed gives the probabilities of single tokens, and objective.kind="
            "distill compares whole distributions"
            + (" and samples from the whole model" if recipe.objective.on_policy else "")
            + "; set update.kind=in_backward or plain"
        )
    if recipe.tokens.kind != "none":
        found.append(
            f"tokens.kind={recipe.tokens.kind} drops tokens that the teacher judges; set "
            "tokens=none with objective.kind=distill"
        )
    return found
