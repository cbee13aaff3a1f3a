"""The recipe's optimizers in the Hugging Face Trainer and in TRL's trainers.

    args = SFTConfig(learning_rate=1e-3, weight_decay=0.1, ...)
    SFTTrainer(..., args=args, optimizer_cls_and_kwargs=optimizer_cls_and_kwargs(args, "apollo"))
    GRPOTrainer(model, ..., args=args, optimizers=optimizers(model, args, "apollo_mini"))

`args` are the trainer's own: a factory is handed the model and nothing else, so what it does not
take from them here (rate, decay, betas, epsilon, seed) would be lost without a word. State resumes:
optimizer.pt holds tensors and plain numbers.
"""

from typing import Any

from pydantic import ValidationError

from mnemic.train.errors import UserError
from mnemic.train.preflight import check_optimizer
from mnemic.train.recipe.base import Part
from mnemic.train.recipe.describe import arms, explain
from mnemic.train.recipe.optimizer import Optimizer

_FROM_ARGS = {
    "lr": "learning_rate",
    "weight_decay": "weight_decay",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "eps": "adam_epsilon",
}


class _Holder(Part):
    optimizer: Optimizer


class OptimizerFactory:
    """What the Trainer takes for a factory: made without arguments, then called with the model."""

    def __init__(self, *groups: Any, **settings: Any) -> None:
        if groups or settings:
            raise UserError(
                "this version of transformers knows no optimizer factories; upgrade it, or pass "
                "Trainer(optimizers=mnemic.train.hf.optimizers(...))"
            )

    def __call__(self, model: Any, *, part: Optimizer, seed: int) -> Any:
        from mnemic.train.optimizers import build_optimizer

        check_optimizer(part.kind)
        return build_optimizer(part, model, seed=seed)


def optimizer_cls_and_kwargs(
    args: Any, kind: str = "apollo", **settings: Any
) -> tuple[type[OptimizerFactory], dict[str, Any]]:
    """For `Trainer(optimizer_cls_and_kwargs=...)`, and SFTTrainer and others that take it.

    `kind` and `settings` are those of the recipe's `optimizer` section; a setting that is not
    given is taken from `args` (TrainingArguments) where they have it. Matrices and the rest are
    told apart by role in the model that is trained, adapters included. `UserError` for an unknown
    kind or key.
    """
    return OptimizerFactory, {"part": _part(args, kind, settings), "seed": args.seed}


def optimizers(
    model: Any, args: Any, kind: str = "apollo", *,
    num_training_steps: int | None = None, **settings: Any,
) -> tuple[Any, Any]:  # fmt: skip
    """For trainers that take only `optimizers=`, such as GRPOTrainer: (optimizer, scheduler).

    Without `num_training_steps` the scheduler is None, and the trainer makes its own, by `args`.
    `model` must be the one that is trained, on its device: with LoRA pass `get_peft_model(...)` to
    both, not `peft_config` to the trainer, which would train other parameters than these.
    """
    optimizer = OptimizerFactory()(model, part=_part(args, kind, settings), seed=args.seed)
    if num_training_steps is None:
        return optimizer, None
    from transformers import get_scheduler

    scheduler = get_scheduler(
        args.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=args.get_warmup_steps(num_training_steps),
        num_training_steps=num_training_steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,
    )
    return optimizer, scheduler


def _part(args: Any, kind: str, settings: dict[str, Any]) -> Optimizer:
    fields = (arms(["optimizer"]) or {}).get(kind, set())
    given = {k: getattr(args, name) for k, name in _FROM_ARGS.items() if k in fields}
    try:
        return _Holder(optimizer={"kind": kind, **given, **settings}).optimizer  # pyright: ignore
    except ValidationError as error:
        raise UserError("\n".join(explain(error))) from None
