"""Recipe parts of the memory system: `memory`, and objective `grpo` with its rewards, credit and
answerer.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mnemic.train.recipe.base import KindShorthand, Part


class Memory(Part):
    """The memory a model manages, and how it is shown and changed. Tokens are words and punctuation
    marks.
    """

    store: Literal["typed", "flat", "text"] = "typed"
    """typed: core text, semantic facts, dated episodic events (Mem-alpha); flat: a bank of facts
    (Memory-R1); text: one text, rewritten whole (MemAgent).
    """
    max_tokens: int | None = Field(default=None, ge=1)
    """Tokens the memory may hold; operations beyond it are refused. null: no bound."""
    core_tokens: int = Field(default=512, ge=1)
    """Tokens of the core text (typed, text)."""
    max_content: int = Field(default=256, ge=1)
    """Tokens of one entry."""
    retrieved: int = Field(default=8, ge=0)
    """Entries shown because a search for the new chunk finds them."""
    recent: int = Field(default=4, ge=0)
    """Entries shown because they were touched last."""
    view_tokens: int = Field(default=1024, ge=8)
    """Tokens of the memory shown beside a chunk."""
    syntax: Literal["lines", "tools"] = "tools"
    """How operations are written: one line each, or <tool_call> blocks of JSON."""
    form: Literal["text", "chat"] = "chat"
    """Prompts as bare text, or in the tokenizer's chat template with instructions."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Longest answer to one chunk, tokens of the model; what is cut off there is an error."""
    feedback: bool = False
    """Show the errors of the turn before in the next prompt."""


class Rewards(Part):
    """Weights of the rewards. All are logged unweighted as `reward/...`."""

    correct: float = Field(default=1.0, ge=0)
    """r1: share of questions answered right from the final memory."""
    valid: float = Field(default=0.2, ge=0)
    """r2, of a turn: share of its calls that were carried out; silence counts where there was
    nothing to store.
    """
    compression: float = Field(default=0.05, ge=0)
    """r3: 1 - memory / stream, tokens; paid only to episodes that answer no worse than their
    group's mean.
    """
    supported: float = Field(default=0.1, ge=0)
    """r4, of a turn: share of its calls whose content stands in the chunk, and of its deletions and
    updates that the chunk speaks of.
    """
    overrun: float = Field(default=0.0, ge=0)
    """r5: minus the share by which the memory exceeds `budget`."""
    stale: float = Field(default=0.0, ge=0)
    """r6: minus the share of questions answered by a superseded value."""
    counterfactual: float = Field(default=0.0, ge=0)
    """r7, of a turn: r1 of the final memory minus r1 without what the turn wrote."""
    budget: int | None = Field(default=None, ge=1)
    """Tokens of memory above which `overrun` counts."""

    @model_validator(mode="after")
    def _check(self) -> "Rewards":
        if self.overrun and self.budget is None:
            raise ValueError(f"overrun={self.overrun:g} needs budget, a number of tokens")
        if not (self.correct or self.counterfactual):
            raise ValueError("correct and counterfactual are both 0, so no answer is rewarded")
        return self


class RuleAnswerer(Part):
    """Reads entries by rule: exact for kvstream, no model."""

    kind: Literal["rule"] = "rule"


class SelfAnswerer(Part):
    """The trained model with its adapters off."""

    kind: Literal["self"] = "self"
    k: int = Field(default=10, ge=1)
    """Entries retrieved for a question where the memory does not fit."""
    max_memory_tokens: int = Field(default=2048, ge=8)
    """Memory shown with a question, tokens."""
    max_new_tokens: int = Field(default=32, ge=1)
    """Longest answer, tokens."""


class ModelAnswerer(SelfAnswerer):
    """Another local model, frozen."""

    kind: Literal["model"] = "model"  # type: ignore[assignment]
    path: str
    """Folder or hub name, or smollm2-135m."""


class EndpointAnswerer(Part):
    """An OpenAI-compatible endpoint; answers are cached on disk. The key is read from
    OPENAI_API_KEY.
    """

    kind: Literal["endpoint"] = "endpoint"
    base_url: str
    """Address up to and with /v1."""
    model: str
    """Name the endpoint knows the model by."""
    concurrency: int = Field(default=8, ge=1)
    """Requests at once."""
    cache: str | None = None
    """File of cached answers; null: answers.sqlite in the run folder."""
    k: int = Field(default=10, ge=1)
    """Entries retrieved for a question where the memory does not fit."""
    max_memory_tokens: int = Field(default=4096, ge=8)
    """Memory shown with a question, tokens."""


Answerer = Annotated[
    RuleAnswerer | SelfAnswerer | ModelAnswerer | EndpointAnswerer,
    Field(discriminator="kind"),
    KindShorthand,
]


class HfGenerator(Part):
    """transformers' generate on the trained model itself."""

    kind: Literal["hf"] = "hf"
    batch_size: int = Field(default=64, ge=1)
    """Prompts at once."""


class VllmGenerator(Part):
    """A `trl vllm-serve` server; trained weights are sent to it before rollouts (extra `rl`)."""

    kind: Literal["vllm"] = "vllm"
    url: str = "http://localhost:8000"
    """Address of the server."""
    timeout: float = Field(default=240.0, gt=0)
    """Seconds to wait for the server to answer at the start."""


Generator = Annotated[HfGenerator | VllmGenerator, Field(discriminator="kind"), KindShorthand]


class Priority(Part):
    """Of `pool` times the episodes of a step, those whose last mean r1 is nearest to `anchor`
    (MemSifter); an effect only where episodes come again.
    """

    anchor: float = Field(default=0.5, ge=0, le=1)
    """The r1 that is preferred."""
    pool: int = Field(default=4, ge=2)
    """Episodes drawn for one that is played."""


PRESETS: dict[str, dict[str, Any]] = {
    # What each paper's released code does, where it differs from the text (Mem-alpha: KL 0.001).
    "mem_alpha": {
        "credit": "pooled_turn", "scale": True, "loss": "dapo", "clip_low": 0.2, "clip_high": 0.2,
        "beta": 0.001, "num_generations": 8,
        "rewards": {"correct": 1.0, "valid": 1.0, "compression": 0.05, "supported": 0.1},
    },
    "memagent": {
        "credit": "trajectory", "scale": False, "loss": "dapo", "clip_low": 0.2, "clip_high": 0.2,
        "beta": 0.001, "num_generations": 16,
        "rewards": {"correct": 1.0, "valid": 0.0, "compression": 0.0, "supported": 0.0},
    },
    "memory_r1": {
        "credit": "trajectory", "scale": True, "loss": "grpo", "clip_low": 0.2, "clip_high": 0.2,
        "beta": 0.001, "num_generations": 8,
        "rewards": {"correct": 1.0, "valid": 0.0, "compression": 0.0, "supported": 0.0},
    },
}  # fmt: skip


def with_preset(value: Any) -> Any:
    if not isinstance(value, dict) or value.get("preset") not in PRESETS:
        return value
    chosen = PRESETS[value["preset"]]
    rewards = {**chosen["rewards"], **(value.get("rewards") or {})}
    return {**chosen, **value, "rewards": rewards}


class GrpoObjective(Part):
    """Reinforcement learning of a memory manager: rollouts of whole episodes in groups, one
    training row a chunk. `loop.batch_size` counts rollouts, `loop.micro_batch_size` rows.
    """

    kind: Literal["grpo"] = "grpo"
    preset: Literal["mem_alpha", "memagent", "memory_r1"] | None = None
    """Settings of a paper for all keys not given here."""
    num_generations: int = Field(default=8, ge=2)
    """Rollouts of one episode: the group that advantages are relative to."""
    credit: Literal["trajectory", "pooled_turn", "turn", "mixed"] = "trajectory"
    """trajectory: one advantage for all turns of a rollout; pooled_turn: rewards of all turns of a
    group normalised together; turn: turn by turn; mixed: answers by trajectory, turn rewards by
    turn.
    """
    scale: bool = True
    """Divide advantages by the group's standard deviation."""
    equal_episodes: bool = False
    """Weigh a row by one over the turns of its episode, so that long streams do not weigh more."""
    loss: Literal["dapo", "grpo", "dr_grpo"] = "dapo"
    """Mean over all tokens; mean over rows of each one's mean; or sum over a constant length."""
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    """The probability ratio is clipped below 1 - clip_low."""
    clip_high: float = Field(default=0.2, gt=0)
    """The probability ratio is clipped above 1 + clip_high."""
    beta: float = Field(default=0.0, ge=0)
    """Weight of the KL divergence from the reference: the model with its adapters off, or a copy of
    the untrained one.
    """
    reuse: int = Field(default=1, ge=1)
    """Optimizer steps on each batch of rollouts; above 1 the ratio to the policy that wrote them
    counts.
    """
    rewards: Rewards = Rewards()
    """Weights of the rewards."""
    answerer: Answerer = RuleAnswerer()
    """Who answers the questions."""
    generator: Generator = HfGenerator()
    """Who writes the rollouts."""
    priority: Priority | None = None
    """Draw more episodes than are played and take those of middling success; null: as they come."""
    max_questions: int = Field(default=32, ge=1)
    """Questions of an episode that are asked, drawn anew each step."""
    max_length: int = Field(default=2048, ge=8)
    """Longest prompt and answer together, tokens."""
