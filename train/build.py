"""From recipe parts to objects: tokenizer, model, optimizer, callbacks. One function a part."""

import logging
from pathlib import Path
from typing import Any

from mnemic.models.load import LoadError
from mnemic.train.callbacks.evaluation import EvaluationCallback, Probe
from mnemic.train.data.formats import FormatError, as_example
from mnemic.train.data.rows import Row
from mnemic.train.data.stream import one_pass
from mnemic.train.errors import UserError
from mnemic.train.exact import checkpoint_layers, install
from mnemic.train.folder import replace_folder
from mnemic.train.objectives.base import Objective
from mnemic.train.objectives.build import eval_rows, eval_stream, reader, sft_tokenizer
from mnemic.train.objectives.check import expert_of
from mnemic.train.preflight import turns_of
from mnemic.train.recipe.memory import GrpoObjective
from mnemic.train.recipe.model import Bank, NoAdapters, QLora, SmolLM2, TinyModel
from mnemic.train.recipe.recipe import Recipe
from mnemic.train.recipe.training import LmObjective, SftObjective
from mnemic.train.rollout.evaluate import Player

log = logging.getLogger("mnemic")


def build_tokenizer(recipe: Recipe) -> Any:
    from transformers.utils import logging as transformers_logging

    from mnemic.models.load import load_tokenizer

    # Bars for work of a second, in the middle of ours.
    transformers_logging.disable_progress_bar()

    model = recipe.model
    if isinstance(model, TinyModel):
        from mnemic.models.tiny import bpe_tokenizer, byte_tokenizer

        if model.vocab_size is not None:
            return bpe_tokenizer(sample_texts(recipe), model.vocab_size, model.max_position)
        return byte_tokenizer(model.max_position)
    try:
        if isinstance(model, SmolLM2):
            return load_tokenizer(smollm2_folder())
        return load_tokenizer(
            model.path, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
    except LoadError as error:
        raise UserError(f"model: {error}") from error


def run_tokenizer(recipe: Recipe, folder: Path, *, keep: bool = False) -> Any:
    """`build_tokenizer` for the run in `folder`. A vocabulary learned from data is the run's own
    from then on (`keep` writes it there): the data may change, and other ids would be another
    model's.
    """
    from mnemic.models.load import load_tokenizer

    kept = folder / "tokenizer"
    if not isinstance(recipe.model, TinyModel) or recipe.model.vocab_size is None:
        return build_tokenizer(recipe)
    if kept.is_dir():
        return load_tokenizer(str(kept))
    tokenizer = build_tokenizer(recipe)
    if keep:
        with replace_folder(kept) as temp:
            tokenizer.save_pretrained(temp)
    return tokenizer


_VOCABULARY_ROWS = 4000


def sample_texts(recipe: Recipe) -> list[str]:
    """The strings of the first rows of the data, for a vocabulary to be learned from."""
    rows = reader(
        recipe.data, holdout=None, held=False, key="data", quiet=True, turns=turns_of(recipe)
    )
    return [text for row in one_pass(rows, _VOCABULARY_ROWS) for text in _strings(row.fields)]


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [text for item in value for text in _strings(item)] if isinstance(value, list) else []


def smollm2_folder() -> str:
    from mnemic.models.smollm2 import ModelUnavailable, ensure_smollm2

    try:
        return str(ensure_smollm2(log=log.info))
    except ModelUnavailable as error:
        raise UserError(f"model.kind=smollm2-135m: {error}") from error


def build_model(recipe: Recipe, tokenizer: Any) -> Any:
    """The model with its adapters, on the CPU; parameters that are not trained are frozen."""
    from mnemic.models.load import load_causal_lm, torch_dtype

    part, adapters, seed = recipe.model, recipe.adapters, recipe.loop.seed
    four_bit: dict[str, Any] = (
        {"quantize_4bit": True, "double_quant": adapters.double_quant}
        if isinstance(adapters, QLora)
        else {}
    )
    try:
        if isinstance(part, TinyModel):
            from mnemic.models.tiny import tiny_llama

            model = tiny_llama(
                tokenizer, hidden_size=part.hidden_size, layers=part.layers, heads=part.heads,
                max_position=part.max_position, seed=seed,
            )  # fmt: skip
            for param in model.parameters():
                # Not model.to(): that would round the rotary frequencies, which stay fp32.
                param.data = param.data.to(torch_dtype(part.dtype))
        elif isinstance(part, SmolLM2):
            model = load_causal_lm(smollm2_folder(), dtype=part.dtype, **four_bit)
        else:
            model = load_causal_lm(
                part.path, dtype=part.dtype, revision=part.revision, attention=part.attention,
                trust_remote_code=part.trust_remote_code, **four_bit,
            )  # fmt: skip
        model.config.use_cache = True
        if not isinstance(adapters, NoAdapters):
            model = add_adapters(recipe, model)
        if part.weights == "int8":
            from mnemic.models.int8 import quantize_body

            try:
                quantize_body(model)
            except ValueError as error:
                raise UserError(f"model.weights=int8: {error}") from error
    except LoadError as error:
        raise UserError(f"model: {error}") from error
    install(recipe.loop, model)
    if recipe.loop.gradient_checkpointing:
        checkpoint_layers(recipe.loop, model, adapted=not isinstance(adapters, NoAdapters))
    return model


def add_adapters(recipe: Recipe, model: Any) -> Any:
    """The recipe's adapters around `model`; a bank's experts all learn, and its first is active."""
    from mnemic.models.lora import add_lora

    adapters = recipe.adapters
    assert not isinstance(adapters, NoAdapters)
    if isinstance(adapters, Bank):
        return _add_bank(recipe, adapters, model)
    return add_lora(
        model, r=adapters.r, alpha=adapters.alpha, dropout=adapters.dropout,
        target_modules=adapters.target_modules, rslora=adapters.rslora,
        dora=adapters.kind == "dora", quantized=isinstance(adapters, QLora),
        seed=recipe.loop.seed, freeze_a=adapters.freeze_a, compute=adapters.compute,
    )  # fmt: skip


def _add_bank(recipe: Recipe, part: Bank, model: Any) -> Any:
    from mnemic.models.adapters import AdapterBank, Expert

    named = part.target_modules
    expert = Expert(
        part.r, part.alpha, part.dropout, named if isinstance(named, str) else tuple(named),
        rslora=part.rslora, freeze_a=part.freeze_a,
    )  # fmt: skip
    streamed = recipe.update.kind == "streamed"
    try:
        bank = AdapterBank(
            model, dict.fromkeys(part.operations, expert), compute=part.compute,
            seed=recipe.loop.seed, base_hash="" if streamed else None,
        )  # fmt: skip
    except ValueError as error:
        raise LoadError(f"adapters: {error}") from error
    words = {"data": data_name(recipe.data), **part.card}
    for operation in part.operations:
        bank.describe(operation, **words)
    bank.train_only(*part.operations)
    bank.activate(part.operations[0])
    return bank.model


def data_name(data: Any) -> str:
    """`jsonl rows.jsonl`, `operations train seed 0`: what a card says of a recipe's data."""
    fields = data.model_dump(include={"kind", "path", "name", "split", "size", "seed"})
    parts = [
        f"{v}" if k in ("kind", "path", "name", "split") else f"{k} {v}" for k, v in fields.items()
    ]
    return " ".join(parts)


def model_folder(recipe: Recipe) -> str:
    """Folder or hub name of a model that is no `tiny` one; fetches SmolLM2 if need be."""
    if isinstance(recipe.model, SmolLM2):
        return smollm2_folder()
    assert not isinstance(recipe.model, TinyModel)
    local = Path(recipe.model.path).expanduser()
    return str(local) if local.exists() else recipe.model.path


def check_length(recipe: Recipe, model: Any) -> None:
    """Rows longer than the model's positions would train on nonsense."""
    limit = getattr(model.config, "max_position_embeddings", None)
    objective = recipe.objective
    lm = isinstance(objective, LmObjective)
    key, length = ("seq_len", objective.seq_len) if lm else ("max_length", objective.max_length)
    if limit and length > limit:
        raise UserError(
            f"objective.{key}={length} is longer than the model's {limit} positions; lower it"
        )


def build_evaluation(
    recipe: Recipe, tokenizer: Any, objective: Objective, samples: Path,
    player: Player | None = None,
) -> EvaluationCallback | None:  # fmt: skip
    part = recipe.evaluation
    if part is None:
        return None
    examples: list[Any] = []
    if not isinstance(recipe.objective, GrpoObjective):
        stream, _ = eval_stream(recipe, tokenizer)
        examples = one_pass(stream, part.max_rows)
        if sum(e.num_targets for e in examples) == 0:
            raise UserError(
                "evaluation: the held-out rows hold no trained token; give more of them"
            )
    probes: list[Probe] = []
    if part.exact_match and isinstance(recipe.objective, SftObjective):
        convert = sft_tokenizer(recipe.objective, tokenizer)
        rows: list[Row] = one_pass(eval_rows(recipe, quiet=True), part.max_rows)
        for row in rows:
            try:
                example = as_example(row.fields)
                prompt, reference = convert.prompt(example), convert.reference(example)
                probes.append(Probe(prompt, reference, expert_of(row, recipe.adapters)))
            except FormatError as error:
                # The stream of examples has reported and counted this row already.
                log.debug("%s: %s", row.where, error)
    return EvaluationCallback(
        objective, examples, probes, tokenizer=tokenizer, every=part.every,
        at_start=part.at_start, batch_size=part.batch_size, max_new_tokens=part.max_new_tokens,
        metric=part.metric, patience=part.patience, samples=samples, player=player,
    )  # fmt: skip
