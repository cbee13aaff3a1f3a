"""Objective `distill` from a recipe: the teacher, and whether its vocabulary is the student's."""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mnemic.models.exact.divergence import Divergence
from mnemic.models.exact.loss import loss_head
from mnemic.models.load import LoadError, load_causal_lm, load_tokenizer
from mnemic.train.errors import UserError
from mnemic.train.objectives.distill import DistillationObjective, Sampler
from mnemic.train.objectives.tokens import base_of, keeps_packed_rows_apart
from mnemic.train.recipe.distill import DistillObjective, PretrainedTeacher
from mnemic.train.recipe.recipe import Recipe

log = logging.getLogger("mnemic")


def distillation(
    recipe: Recipe, model: Any, tokenizer: Any, accelerator: Any, autocast: Callable[[], Any]
) -> Callable[..., DistillationObjective]:
    """What takes `TokenObjective`'s arguments and gives objective `distill`. `model`: the student
    without wrappers, which samples where the recipe is on-policy.
    """
    part = recipe.objective
    assert isinstance(part, DistillObjective)
    with accelerator.main_process_first():
        teacher = build_teacher(part, tokenizer, model)
    if part.packing and not keeps_packed_rows_apart(teacher):
        raise UserError(
            f"objective.packing=true: the teacher, {type(base_of(teacher)).__name__}, lets packed "
            "rows see each other; set it to false"
        )
    sampler = None
    if part.on_policy:
        sampler = Sampler(
            model, tokenizer, part.on_policy, part.max_new_tokens, part.max_length,
            recipe.loop.seed, autocast,
        )  # fmt: skip
    return partial(
        DistillationObjective, teacher=teacher.to(accelerator.device),
        divergence=Divergence(part.divergence, part.temperature, part.jsd_beta),
        hard_weight=part.hard_weight, sampler=sampler,
    )  # fmt: skip


def teacher_folder(part: DistillObjective) -> str:
    """Folder or hub name; fetches SmolLM2 if need be."""
    if isinstance(part.teacher, PretrainedTeacher):
        local = Path(part.teacher.path).expanduser()
        return str(local) if local.exists() else part.teacher.path
    from mnemic.train.build import smollm2_folder

    return smollm2_folder()


def build_teacher(part: DistillObjective, tokenizer: Any, student: Any) -> Any:
    """The teacher on the CPU, checked against the student; `UserError` says what does not fit."""
    teacher, path = part.teacher, teacher_folder(part)
    extra: dict[str, Any] = {}
    if isinstance(teacher, PretrainedTeacher):
        extra = {"revision": teacher.revision, "trust_remote_code": teacher.trust_remote_code}
    try:
        check_tokens(tokenizer, load_tokenizer(path, **extra))
        model = load_causal_lm(path, dtype=teacher.dtype, **extra)
    except LoadError as error:
        raise UserError(f"objective.teacher: {error}") from error
    if teacher.adapters:
        model = _adapted(model, Path(teacher.adapters).expanduser())
    check_heads(tokenizer, student, model)
    limit = getattr(base_of(model).config, "max_position_embeddings", None)
    if limit and part.max_length > limit:
        raise UserError(
            f"objective.max_length={part.max_length} is longer than the teacher's {limit} "
            "positions; lower it"
        )
    limit = getattr(base_of(student).config, "max_position_embeddings", None)
    if limit and part.on_policy and part.max_length + part.max_new_tokens > limit:
        raise UserError(
            f"objective.max_length={part.max_length} and max_new_tokens={part.max_new_tokens} are "
            f"together longer than the model's {limit} positions; lower one of them"
        )
    return model.requires_grad_(False).eval()


def _adapted(model: Any, folder: Path) -> Any:
    from peft import PeftModel

    if not (folder / "adapter_config.json").is_file():
        raise UserError(
            f"objective.teacher.adapters: {folder} has no adapter_config.json; give a folder that "
            "peft or mnemic export wrote"
        )
    try:
        return PeftModel.from_pretrained(model, str(folder))
    except (RuntimeError, ValueError) as error:
        reason = next((x for x in str(error).splitlines() if x.strip()), repr(error))
        raise UserError(
            f"objective.teacher.adapters: {folder} does not fit the teacher: {reason.strip()}"
        ) from error


def check_tokens(mine: Any, other: Any) -> None:
    """`UserError` unless both tokenizers give every id the same token."""
    own, its = mine.get_vocab(), other.get_vocab()
    if own == its:
        return
    odd = sorted(own.items() ^ its.items(), key=lambda item: (item[1], item[0]))
    raise UserError(
        "objective.teacher: its vocabulary is not the model's, so their distributions cannot be "
        f"compared ({len(its):,} tokens against {len(own):,}, {len(odd):,} entries differ, such as "
        f"{odd[0][0]!r}); take a teacher of the model's family, or train on the teacher's text "
        "with objective.kind=sft"
    )


def check_heads(tokenizer: Any, student: Any, teacher: Any) -> int:
    """Rows of the vocabulary that both heads have: all of the tokenizer's, or `UserError`. What one
    head has beyond that is padding, and is left out of both distributions.
    """
    sizes = [loss_head(base_of(model)).vocabulary for model in (student, teacher)]
    known, common = max(tokenizer.get_vocab().values()) + 1, min(sizes)
    if common < known:
        raise UserError(
            f"objective.teacher: the heads of model and teacher have {sizes[0]:,} and {sizes[1]:,} "
            f"rows, and the vocabulary {known:,} tokens, so that one of them knows tokens the "
            "other cannot give; take a teacher of the model's family"
        )
    if sizes[0] != sizes[1]:
        log.info("distilling over %s rows of the vocabulary; heads have %s and %s",
                 f"{common:,}", *(f"{size:,}" for size in sizes))  # fmt: skip
    return common
