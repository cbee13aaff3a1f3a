"""From the recipe's `data` and `objective` to streams of examples: the one place that
knows both.
"""

from dataclasses import dataclass, replace
from typing import Any

from mnemic.models.memory.episode import MemoryConfig
from mnemic.train.data.collate import by_operation, pack_rows
from mnemic.train.data.formats import FormatError, as_example, as_text
from mnemic.train.data.memory.episode import EpisodeRow, as_episode
from mnemic.train.data.rows import BadRows, Row, Source
from mnemic.train.data.sources import TextSource, open_source
from mnemic.train.data.stream import Concat, Map, Reader, Stage, Window, one_pass, shuffled
from mnemic.train.data.tokenize import Example, SftTokenizer, lm_ids
from mnemic.train.errors import UserError
from mnemic.train.objectives.check import expert_of
from mnemic.train.preflight import turns_of
from mnemic.train.recipe.data import Data, KvStreamData
from mnemic.train.recipe.recipe import Recipe
from mnemic.train.recipe.training import LmObjective, SftObjective


@dataclass
class Streams:
    """The training stream, its bad-row counter, and whether its rows are packed."""

    stream: Stage[Example]
    bad: BadRows
    packed: bool


def memory_config(recipe: Recipe) -> MemoryConfig | None:
    """The memory a recipe trains, or plays with."""
    return MemoryConfig(**recipe.memory.model_dump()) if recipe.memory else None


def reader(
    data: Data, *, holdout: float | None, held: bool, key: str, quiet: bool = False,
    turns: MemoryConfig | None = None,
) -> Reader:  # fmt: skip
    """Rows of `data`: with `holdout`, either those held out (`held`) or the others."""
    source = open_source(data, key=key, turns=turns)
    bad = BadRows(data.on_bad_row, key=key, quiet=quiet)
    if holdout is None:
        return Reader(source, bad)
    if isinstance(source, TextSource):
        source.share = (1 - holdout, 1.0) if held else (0.0, 1 - holdout)
        return Reader(source, bad)
    nth = round(1 / holdout)
    if nth < 2:
        raise UserError(
            f"evaluation.holdout={holdout}: keeps at most half of the rows out; take 0.5 or less"
        )
    return Reader(source, bad, nth=nth, held=held)


def sft_tokenizer(objective: SftObjective, tokenizer: Any) -> SftTokenizer:
    return SftTokenizer(
        tokenizer,
        loss_on=objective.loss_on,
        max_length=objective.max_length,
        truncate=objective.too_long == "truncate",
        system=objective.system,
    )


def train_stream(recipe: Recipe, tokenizer: Any, *, quiet: bool = False) -> Streams:
    """The endless stream the loop draws from; it begins at the first row and is moved by
    `load_state_dict`.
    """
    data, objective, seed = recipe.data, recipe.objective, recipe.loop.seed
    holdout = recipe.evaluation.holdout if recipe.evaluation else None
    rows = reader(
        data, holdout=holdout, held=False, key="data", quiet=quiet, turns=turns_of(recipe)
    )
    if isinstance(objective, LmObjective):
        stream = _lm(rows, tokenizer, objective)
        if data.shuffle:
            stream = shuffled(stream, data.shuffle_window, seed)
        return Streams(stream, rows.bad, packed=False)
    assert isinstance(objective, SftObjective)
    upstream = shuffled(rows, data.shuffle_window, seed) if data.shuffle else rows
    examples = _sft(upstream, tokenizer, recipe, rows.bad)
    if not objective.packing:
        return Streams(examples, rows.bad, packed=False)

    def pack(items: list[Example], number: int) -> list[Example]:
        # Joined rows are run by one expert.
        packed = [
            row
            for _, own in by_operation(items, lambda row: row.operation)
            for row in pack_rows(own, objective.max_length)
        ]
        return shuffle_packed(packed, number) if data.shuffle else packed

    shuffle_packed = shuffled(Stage[Example](), 1, seed).rearrange
    return Streams(Window(examples, data.shuffle_window, pack), rows.bad, packed=True)


def eval_stream(recipe: Recipe, tokenizer: Any) -> tuple[Stage[Any], BadRows]:
    """One finite pass over the held-out rows, in order: `Example`s."""
    evaluation, objective = recipe.evaluation, recipe.objective
    assert evaluation is not None
    rows = eval_rows(recipe)
    if isinstance(objective, LmObjective):
        return _lm(rows, tokenizer, objective, flush=True), rows.bad
    assert isinstance(objective, SftObjective)
    return _sft(rows, tokenizer, recipe, rows.bad), rows.bad


def eval_rows(recipe: Recipe, *, quiet: bool = False) -> Reader:
    evaluation = recipe.evaluation
    assert evaluation is not None
    turns = turns_of(recipe)
    if evaluation.data is not None:
        return reader(
            evaluation.data, holdout=None, held=False, key="evaluation.data", quiet=quiet,
            turns=turns,
        )  # fmt: skip
    return reader(
        recipe.data, holdout=evaluation.holdout, held=True, key="data", quiet=quiet, turns=turns
    )


def episode_stream(recipe: Recipe, *, quiet: bool = False) -> tuple[Stage[EpisodeRow], Source]:
    """The endless stream of episodes that objective `grpo` draws from, and its source."""
    data = recipe.data
    rows = reader(data, holdout=None, held=False, key="data", quiet=quiet)
    # Generated episodes are drawn at random already, and a curriculum's must be made when played.
    shuffle = data.shuffle and not isinstance(data, KvStreamData)
    upstream = shuffled(rows, data.shuffle_window, recipe.loop.seed) if shuffle else rows
    return Map(upstream, lambda row: _episode(row, rows.bad)), rows.source


def held_episodes(recipe: Recipe, limit: int | None) -> list[EpisodeRow]:
    """Held-out episodes to play, in order."""
    evaluation = recipe.evaluation
    assert evaluation is not None
    data = evaluation.data or recipe.data
    rows = reader(data, holdout=None, held=False, key="evaluation.data", quiet=True)
    return one_pass(Map(rows, lambda row: _episode(row, rows.bad)), limit)


def _episode(row: Row, bad: BadRows) -> EpisodeRow | None:
    try:
        return as_episode(row.fields)
    except FormatError as error:
        bad.add(row.bad(error))
        return None


def _lm(
    rows: Reader, tokenizer: Any, objective: LmObjective, *, flush: bool = False
) -> Stage[Example]:
    def tokenize(row: Row) -> list[int] | None:
        try:
            text = as_text(row.fields)
        except FormatError as error:
            rows.bad.add(row.bad(error))
            return None
        return lm_ids(tokenizer, text, last=row.fields.get("last", True)) or None

    def label(ids: list[int]) -> Example:
        return Example(ids, [-100, *ids[1:]], (len(ids),), len(ids))

    return Map(Concat(Map(rows, tokenize), objective.seq_len, flush=flush), label)


def _sft(rows: Stage[Row], tokenizer: Any, recipe: Recipe, bad: BadRows) -> Stage[Example]:
    objective = recipe.objective
    assert isinstance(objective, SftObjective)
    convert = sft_tokenizer(objective, tokenizer)

    def tokenize(row: Row) -> Example | None:
        try:
            example = convert(as_example(row.fields))
            if operation := expert_of(row, recipe.adapters):
                example = replace(example, operation=operation)
        except FormatError as error:
            bad.add(row.bad(error))
            return None
        if example.source_length > objective.max_length:
            bad.cut(row, example.source_length, objective.max_length)
        return example

    return Map(rows, tokenize)
