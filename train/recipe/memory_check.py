"""What contradicts itself between `memory`, `objective`, `data` and the rest of a recipe."""

from typing import TYPE_CHECKING

from mnemic.train.recipe.data import (
    EpisodesData,
    HubData,
    JsonlData,
    KvStreamData,
    ParquetData,
)
from mnemic.train.recipe.memory import GrpoObjective
from mnemic.train.recipe.model import NoAdapters
from mnemic.train.recipe.training import LmObjective, SftObjective

if TYPE_CHECKING:
    from mnemic.train.recipe.recipe import Recipe

_EPISODES = "kvstream, episodes, jsonl, parquet or hub"
_ROWS = (KvStreamData, EpisodesData, JsonlData, ParquetData, HubData)


def check_memory(recipe: "Recipe") -> list[str]:
    """One sentence for each contradiction."""
    found = []
    objective, evaluation = recipe.objective, recipe.evaluation
    sections = [("data", recipe.data)]
    if evaluation and evaluation.data:
        sections.append(("evaluation.data", evaluation.data))
    for key, data in sections:
        if isinstance(data, EpisodesData) and not isinstance(objective, GrpoObjective):
            found.append(
                f"{key}.kind=episodes has no operations to learn from; set objective.kind=grpo, or "
                f"{key}.kind=kvstream, which has a teacher"
            )
        if isinstance(data, KvStreamData):
            if isinstance(objective, LmObjective):
                found.append(f"{key}.kind=kvstream needs objective.kind=sft or grpo")
            if data.stages and not isinstance(objective, GrpoObjective):
                found.append(f"{key}.stages has no effect on objective.kind={objective.kind}")
            if data.teacher != type(data.teacher)() and isinstance(objective, GrpoObjective):
                found.append(f"{key}.teacher has no effect on objective.kind=grpo; remove it")
    needs = [key for key, data in sections if isinstance(data, (KvStreamData, EpisodesData))]
    if isinstance(objective, GrpoObjective):
        needs.append("objective.kind=grpo")
    if evaluation and evaluation.play:
        needs.append("evaluation.play")
    if needs and recipe.memory is None:
        found.append(f"memory: missing; {needs[0]} needs to know what memory there is")
    if recipe.memory is not None and not needs:
        found.append(
            "memory has no effect here; remove it, or set data.kind=kvstream or objective.kind=grpo"
        )
    if evaluation and evaluation.metric == "eval/r1" and not (
        evaluation.play or isinstance(objective, GrpoObjective)
    ):  # fmt: skip
        found.append("evaluation.metric=eval/r1 needs evaluation.play, a number of episodes")
    if evaluation and evaluation.play and isinstance(objective, SftObjective):
        own = evaluation.data or recipe.data
        if not isinstance(own, KvStreamData):
            found.append("evaluation.play needs evaluation.data.kind=kvstream under objective sft")
    if isinstance(objective, GrpoObjective):
        found += _check_grpo(recipe, objective)
    return found


def _check_grpo(recipe: "Recipe", objective: GrpoObjective) -> list[str]:
    found = []
    size, group = recipe.loop.batch_size, objective.num_generations
    if size % group:
        found.append(
            f"loop.batch_size={size} counts rollouts and must be a multiple of "
            f"objective.num_generations={group}"
        )
    if recipe.loop.steps is None:
        found.append("loop.epochs: rollouts have no end; give loop.steps with objective.kind=grpo")
    if not isinstance(recipe.data, _ROWS):
        found.append(
            f"data.kind={recipe.data.kind} has no episodes; set it to {_EPISODES}, or "
            "objective.kind=sft"
        )
    evaluation = recipe.evaluation
    if evaluation:
        if evaluation.data is None:
            found.append("evaluation.holdout splits rows; give evaluation.data for episodes")
        if evaluation.metric == "eval/loss":
            found.append("evaluation.metric=eval/loss: grpo has none; set it to eval/r1")
        if evaluation.exact_match:
            found.append("evaluation.exact_match needs objective.kind=sft; set it to false")
    if recipe.update.kind == "streamed":
        found.append(
            "update.kind=streamed has no whole model to write rollouts with; set update.kind=plain "
            "or in_backward"
        )
    if recipe.tokens.kind != "none":
        found.append(
            f"tokens.kind={recipe.tokens.kind} changes the probabilities of the policy that wrote "
            "the rollouts; set tokens=none with objective.kind=grpo"
        )
    if objective.answerer.kind == "self" and isinstance(recipe.adapters, NoAdapters):
        found.append(
            "objective.answerer.kind=self is the model without its adapters; set adapters=lora, or "
            "answerer.kind=model"
        )
    memory = recipe.memory
    if memory and memory.max_new_tokens >= objective.max_length:
        found.append(
            f"memory.max_new_tokens={memory.max_new_tokens} leaves no room for a prompt in "
            f"objective.max_length={objective.max_length}"
        )
    return found
