"""The recipe: one YAML file, typed. Cross-part contradictions are refused here, before anything
heavy loads.
"""

from pydantic import Field, model_validator

from mnemic.train.recipe.bank_check import check_bank
from mnemic.train.recipe.base import Part
from mnemic.train.recipe.data import Data, TextData
from mnemic.train.recipe.distill import check_distill
from mnemic.train.recipe.memory import GrpoObjective, Memory
from mnemic.train.recipe.memory_check import check_memory
from mnemic.train.recipe.model import Adapters, Model, NoAdapters, TinyModel
from mnemic.train.recipe.offload import NoOffload, Offload
from mnemic.train.recipe.offload_check import check_offload
from mnemic.train.recipe.optimizer import Optimizer
from mnemic.train.recipe.tokens import NoTokens, Tokens, check_tokens
from mnemic.train.recipe.training import (
    Evaluation,
    LmObjective,
    Loop,
    NoTracking,
    Objective,
    PlainUpdate,
    SftObjective,
    Track,
    Update,
)


class Recipe(Part):
    """Everything a run depends on. `recipe.yaml` in the run folder is its complete dump."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run: letters, digits, `.`, `_`, `-`."""
    run_dir: str | None = None
    """Folder of the run; null means `runs/<name>`."""
    model: Model
    """Which language model."""
    adapters: Adapters = NoAdapters()
    """What is trained beside the frozen model, or `none` to train the model itself."""
    data: Data
    """Training rows."""
    objective: Objective
    """What the loss is."""
    optimizer: Optimizer
    """How gradients become steps."""
    update: Update = PlainUpdate()
    """When gradients become weights."""
    offload: Offload = NoOffload()
    """Where weights, optimizer states and saved activations lie."""
    tokens: Tokens = NoTokens()
    """Which tokens layers run on: fewer make long rows cheap, and change the result."""
    memory: Memory | None = None
    """The memory that a manager learns to keep; null for everything else."""
    loop: Loop
    """How long, how much at once, what is kept."""
    evaluation: Evaluation | None = None
    """Measures on held-out rows; null for none."""
    track: Track = NoTracking()
    """Where metrics go besides metrics.jsonl."""

    @property
    def folder(self) -> str:
        return self.run_dir or f"runs/{self.name}"

    @property
    def settles_heap(self) -> bool:
        """Whether the run lets malloc give back what is freed, for some time of its own: those that
        are meant to take little memory.
        """
        return self.update.kind in ("in_backward", "streamed") or self.offload.activations == "ssd"

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        problems = []
        evaluation, objective = self.evaluation, self.objective
        eval_data = evaluation.data if evaluation else None
        for key, data in (("data", self.data), ("evaluation.data", eval_data)):
            if isinstance(data, TextData) and isinstance(objective, SftObjective):
                problems.append(
                    f"{key}.kind=text has no prompts; "
                    f"set objective.kind=lm, or {key}.kind to jsonl, csv, parquet, hub or facts"
                )
        if evaluation and evaluation.exact_match and isinstance(objective, LmObjective):
            problems.append(
                "evaluation.exact_match needs prompts; set it to false, or objective.kind=sft"
            )
        loop = self.loop
        uneven = loop.micro_batch_size and loop.batch_size % loop.micro_batch_size
        if uneven and not isinstance(objective, GrpoObjective):
            # Rollouts give as many rows as their streams have chunks.
            problems.append(
                f"loop: batch_size={loop.batch_size} is not a multiple of "
                f"micro_batch_size={loop.micro_batch_size}; change one of the two"
            )
        length_key, length = (
            ("objective.seq_len", objective.seq_len)
            if isinstance(objective, LmObjective)
            else ("objective.max_length", objective.max_length)
        )
        if isinstance(self.model, TinyModel) and length > self.model.max_position:
            problems.append(
                f"{length_key}={length} is longer than model.max_position="
                f"{self.model.max_position}; lower the first or raise the second"
            )
        if self.model.weights == "int8":
            if not isinstance(self.adapters, NoAdapters):
                problems.append(
                    f"adapters.kind={self.adapters.kind} freezes the weights that "
                    "model.weights=int8 trains; set adapters=none, or model.weights=full"
                )
            if self.optimizer.kind not in ("apollo", "apollo_mini"):
                problems.append(
                    f"optimizer.kind={self.optimizer.kind} cannot change int8 weights; set it to "
                    "apollo or apollo_mini, or model.weights=full"
                )
        problems += check_offload(
            self.model, self.adapters, self.optimizer, self.update, self.offload
        )
        problems += check_memory(self)
        problems += check_distill(self)
        problems += check_bank(self)
        problems += check_tokens(self.tokens, self.adapters, self.objective, self.update, self.loop)
        if problems:
            raise ValueError("\n".join(problems))
        return self
