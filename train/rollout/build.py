"""From recipe parts to what plays episodes: generator, answerer, reference, player, objective."""

import copy
import logging
from pathlib import Path
from typing import Any

from mnemic.models.load import LoadError
from mnemic.models.memory.answer import Answerer
from mnemic.train.data.memory.rows import KvSource
from mnemic.train.errors import UserError
from mnemic.train.objectives.build import episode_stream, held_episodes, memory_config
from mnemic.train.objectives.grpo import PolicyObjective, Ranks
from mnemic.train.recipe.memory import (
    EndpointAnswerer,
    GrpoObjective,
    ModelAnswerer,
    RuleAnswerer,
    VllmGenerator,
)
from mnemic.train.recipe.model import NoAdapters
from mnemic.train.recipe.recipe import Recipe
from mnemic.train.rollout.curriculum import Curriculum
from mnemic.train.rollout.evaluate import Player
from mnemic.train.rollout.play import Generator, ModelGenerator

log = logging.getLogger("mnemic")

_PLAY_BATCH = 64


def build_answerer(part: Any, model: Any, tokenizer: Any, folder: Path) -> Answerer:
    """Who answers, as the recipe says; a model that is not there is a `UserError`."""
    if isinstance(part, RuleAnswerer):
        from mnemic.models.memory.rule_reader import RuleReader

        return RuleReader()
    if isinstance(part, EndpointAnswerer):
        from mnemic.models.memory.endpoint_reader import EndpointReader

        cache = Path(part.cache).expanduser() if part.cache else folder / "answers.sqlite"
        return EndpointReader(
            part.base_url, part.model, concurrency=part.concurrency, cache=cache, k=part.k,
            max_memory_tokens=part.max_memory_tokens,
        )  # fmt: skip
    from mnemic.models.memory.model_reader import ModelReader, SelfReader

    bounds = {
        "k": part.k, "max_memory_tokens": part.max_memory_tokens,
        "max_new_tokens": part.max_new_tokens,
    }  # fmt: skip
    if not isinstance(part, ModelAnswerer):
        return SelfReader(model, tokenizer, **bounds)
    path = part.path
    if path == "smollm2-135m":
        from mnemic.train.build import smollm2_folder

        path = smollm2_folder()
    try:
        return ModelReader.from_pretrained(path, **bounds)
    except (ValueError, LoadError) as error:
        raise UserError(f"objective.answerer.path: {error}") from error


def build_generator(
    recipe: Recipe, model: Any, tokenizer: Any, accelerator: Any = None
) -> Generator:
    """Who writes, as the recipe says: the model itself where it says nothing."""
    memory = memory_config(recipe)
    assert memory is not None
    part = getattr(recipe.objective, "generator", None)
    if isinstance(part, VllmGenerator):
        from mnemic.train.rollout.vllm import ServerGenerator

        shared = accelerator is not None
        return ServerGenerator(
            part.url, model, tokenizer, max_new_tokens=memory.max_new_tokens, timeout=part.timeout,
            sends=not shared or accelerator.is_main_process,
            barrier=accelerator.wait_for_everyone if shared else lambda: None,
        )  # fmt: skip
    size = part.batch_size if part is not None else _PLAY_BATCH
    return ModelGenerator(model, tokenizer, max_new_tokens=memory.max_new_tokens, batch_size=size)


def build_player(
    recipe: Recipe, model: Any, tokenizer: Any, folder: Path, *, generator: Generator | None = None,
    answerer: Answerer | None = None,
) -> Player | None:  # fmt: skip
    """What evaluation plays; None where the recipe has nothing to play."""
    part, memory = recipe.evaluation, memory_config(recipe)
    grpo = isinstance(recipe.objective, GrpoObjective)
    if part is None or memory is None or not (part.play or grpo):
        return None
    rows = held_episodes(recipe, part.play)
    generator = generator or build_generator(recipe, model, tokenizer)
    answer = getattr(recipe.objective, "answerer", RuleAnswerer())
    answerer = answerer or build_answerer(answer, model, tokenizer, folder)
    length = getattr(recipe.objective, "max_length", 1 << 20)
    return Player(rows, memory, tokenizer, generator, answerer, length)


def build_policy(
    recipe: Recipe, model: Any, tokenizer: Any, accelerator: Any, folder: Path, autocast: Any
) -> PolicyObjective:
    """Objective `grpo`. `model` without wrappers, as it is before any resume: with KL and without
    adapters a copy of it is the reference.
    """
    part, memory = recipe.objective, memory_config(recipe)
    assert isinstance(part, GrpoObjective) and memory is not None
    stream, source = episode_stream(recipe, quiet=not accelerator.is_main_process)
    curriculum = None
    if isinstance(source, KvSource) and source.data.stages:
        curriculum = Curriculum(source, source.data.mastery)
    reference = None
    if part.beta and isinstance(recipe.adapters, NoAdapters):
        reference = copy.deepcopy(model).requires_grad_(False).eval()
    generator = build_generator(recipe, model, tokenizer, accelerator)
    return PolicyObjective(
        stream, part, memory, model=model, reference=reference, generator=generator,
        answerer=build_answerer(part.answerer, model, tokenizer, folder), tokenizer=tokenizer,
        batch_size=recipe.loop.batch_size,
        micro_batch_size=recipe.loop.micro_batch_size or recipe.loop.batch_size,
        seed=recipe.loop.seed, device=accelerator.device, autocast=autocast,
        ranks=_ranks(accelerator), curriculum=curriculum,
    )  # fmt: skip


def _ranks(accelerator: Any) -> Ranks:
    if accelerator.num_processes == 1:
        return Ranks()
    import torch.distributed as dist

    def gather(own: Any) -> list[Any]:
        found: list[Any] = [None] * accelerator.num_processes
        dist.all_gather_object(found, own)
        return found

    return Ranks(accelerator.process_index, accelerator.num_processes, gather)
