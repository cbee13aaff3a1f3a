"""What the batches of a recipe look like: rows, width, and the columns whose logits are wanted.

Packed text has one shape. Conversations have any: the first rows of the data are looked at, and
where there are none yet (or rows of a given length are asked for) every row is as long as it may
be and every token is trained, which is the most it can take.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mnemic.train.data.collate import Batch, chunks_of, collate
from mnemic.train.data.sources import find_files
from mnemic.train.data.stream import one_pass, take
from mnemic.train.data.tokenize import IGNORE, Example
from mnemic.train.errors import UserError
from mnemic.train.recipe.data import (
    Data,
    EpisodesData,
    FactsData,
    HubData,
    KvStreamData,
    OperationsData,
)
from mnemic.train.recipe.memory import GrpoObjective, HfGenerator
from mnemic.train.recipe.recipe import Recipe
from mnemic.train.recipe.training import LmObjective, SftObjective

_STEPS, _ROWS = 16, 512  # of the data that are looked at, at the most
_ON = 0.5  # of a teacher's longest turn, found by the runs of docs/plan.md
_ROW = 1000  # bytes of the objects around a row's text


@dataclass(frozen=True)
class Shape:
    """One forward. `columns`: positions of a row whose logits are wanted; None for all."""

    rows: int
    width: int
    columns: int | None = None
    padded: bool = False
    packed: bool = False

    @property
    def tokens(self) -> int:
        return self.rows * self.width

    @property
    def head_tokens(self) -> int:
        return self.rows * (self.width if self.columns is None else self.columns)

    def batch(self, device: Any) -> Batch:
        """Such a batch, of zeros."""
        import torch

        def zeros(*shape: int) -> Any:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        tensors = {name: zeros(self.rows, self.width) for name in ("input_ids", "labels")}
        if self.packed:
            tensors["position_ids"] = zeros(self.rows, self.width)
        elif self.padded:
            tensors["attention_mask"] = zeros(self.rows, self.width)
        if self.columns is not None:
            tensors["logit_columns"] = zeros(self.columns)
        return Batch(tensors, 1.0)


@dataclass
class Shapes:
    """A step's micro-batches; the largest forward of a step, of an evaluation, of a generation.
    `data_bytes`: rows that wait in memory, to be shuffled. `note`: where all this is from.
    """

    step: list[Shape]
    evaluation: Shape | None = None
    prompts: Shape | None = None
    data_bytes: int = 0
    note: str = ""
    missing: list[str] = field(default_factory=list)

    @property
    def largest(self) -> Shape:
        return _hull(self.step)


def shapes_of(recipe: Recipe, tokenizer: Any | None, length: int | None = None) -> Shapes:
    """`tokenizer`: None where the model's folder has none; `length`: tokens of a row, in place of
    the recipe's.
    """
    objective, loop = recipe.objective, recipe.loop
    if isinstance(objective, GrpoObjective):
        return _rollout_shapes(recipe, objective, length, tokenizer)
    lm = isinstance(objective, LmObjective)
    most = length or (objective.seq_len if lm else objective.max_length)
    micro = loop.micro_batch_size or loop.batch_size
    found = Shapes([Shape(micro, most)] * (loop.batch_size // micro))
    found.note = f"rows of {most:,} tokens"
    part = recipe.evaluation
    if part is not None:
        rows = min(part.batch_size, part.max_rows or part.batch_size)
        found.evaluation = Shape(rows, most)
        found.prompts = Shape(rows, most) if part.exact_match else None
    if isinstance(recipe.data, HubData) or tokenizer is None:
        found.note += "" if lm else ", all of them trained"
        return found
    try:
        looked = _look(recipe, tokenizer, found if lm or length else None)
    except UserError as error:
        found.missing.append(f"the data was not looked at: {error}")
        found.note += "" if lm else ", all of them trained"
        return found
    return looked


_CHUNKS = 8
"""Of an episode, where its file would have to be read to know."""


def _rollout_shapes(
    recipe: Recipe, objective: GrpoObjective, length: int | None, tokenizer: Any | None
) -> Shapes:
    """Rows, one a chunk, and the prompts of a generation. On generated streams they are as long as
    a teacher's; elsewhere, or with a `length`, of at most that or `max_length` tokens.
    """
    loop, data = recipe.loop, recipe.data
    most = length or objective.max_length
    micro = loop.micro_batch_size or loop.batch_size
    chunks = data.stream.n_chunks if isinstance(data, KvStreamData) else _CHUNKS
    count = max(1, math.ceil(loop.batch_size * chunks / micro))
    found = Shapes([Shape(micro, most, padded=True)] * count)
    found.note = f"at most {micro} rows of {most:,} tokens (objective.max_length) at once"
    if isinstance(objective.generator, HfGenerator):
        rows = min(objective.generator.batch_size, loop.batch_size)
        found.prompts = Shape(rows, most, 1, padded=True)
    if isinstance(data, KvStreamData) and tokenizer is not None and not length:
        _as_taught(recipe, objective, tokenizer, found, micro * count)
    return found


def _as_taught(
    recipe: Recipe, objective: GrpoObjective, tokenizer: Any, found: Shapes, rows: int
) -> None:
    """Give `found` the lengths of a teacher's turns on the same streams."""
    from mnemic.train.objectives.build import train_stream

    taught = SftObjective(max_length=objective.max_length)
    streams = train_stream(recipe.model_copy(update={"objective": taught}), tokenizer, quiet=True)
    turns = take(streams.stream, min(rows, _ROWS))
    if not turns:
        return
    size = found.step[0].rows
    hull = _hull([_shape(turns[i : i + size], False) for i in range(0, len(turns), size)])
    # Sampled turns run on past the longest of a teacher's.
    longest = max(sum(label != IGNORE for label in turn.labels) for turn in turns)
    more = int(_ON * longest)
    if recipe.memory is not None:
        more = min(more, max(0, recipe.memory.max_new_tokens - longest))
    width = min(hull.width + more, objective.max_length)
    columns = None if hull.columns is None else hull.columns + width - hull.width
    found.step = [Shape(size, width, columns, padded=True)] * len(found.step)
    found.note = (
        f"{size} rows of {width:,} tokens at once, a little more than a teacher's turns; at most "
        f"{objective.max_length:,} (objective.max_length)"
    )
    if found.prompts is not None:
        prompts = [sum(label == IGNORE for label in turn.labels) for turn in turns]
        found.prompts = replace(found.prompts, width=max(prompts))


def _look(recipe: Recipe, tokenizer: Any, known: Shapes | None) -> Shapes:
    """From the first rows of the data. Where the shapes are `known`, only what waits in memory."""
    from mnemic.train.objectives.build import train_stream

    loop = recipe.loop
    window = min(recipe.data.shuffle_window, _ROWS)
    data = recipe.data.model_copy(update={"shuffle_window": window})
    small = recipe.model_copy(update={"data": data})
    streams = train_stream(small, tokenizer, quiet=True)
    steps = 1 if known else max(1, min(_STEPS, _ROWS // loop.batch_size))
    rows = take(streams.stream, steps * min(loop.batch_size, _ROWS))
    waiting = _waiting_bytes(recipe, tokenizer, rows)
    if known:
        return replace(known, data_bytes=waiting)
    micro = loop.micro_batch_size or loop.batch_size
    found: list[list[Shape]] = []
    for start in range(0, len(rows), loop.batch_size):
        batch = sorted(rows[start : start + loop.batch_size], key=lambda e: len(e.input_ids))
        chunks = chunks_of(batch, micro, 1, lambda row: row.operation)
        found.append([_shape(chunk, streams.packed) for chunk in chunks])
    worst = max(found, key=lambda step: sum(shape.tokens for shape in step))
    hull = _hull([shape for step in found for shape in step])
    worst = [*worst[:-1], hull]
    text = f"the largest of the first {len(found)} steps: {hull.rows} rows of {hull.width:,} tokens"
    shapes = Shapes(worst, data_bytes=waiting, note=text)
    _look_at_evaluation(recipe, tokenizer, shapes)
    return shapes


def _shape(rows: Sequence[Example], packed: bool) -> Shape:
    tensors = collate(list(rows), pad_id=0, packed=packed).tensors
    count, width = tensors["input_ids"].shape
    columns = tensors.get("logit_columns")
    return Shape(
        count, width, None if columns is None else len(columns), "attention_mask" in tensors, packed
    )


def _hull(shapes: Sequence[Shape]) -> Shape:
    """As large as each of them."""
    whole = any(shape.columns is None for shape in shapes)
    return Shape(
        max(s.rows for s in shapes), max(s.width for s in shapes),
        None if whole else max(s.columns or 0 for s in shapes),
        any(s.padded for s in shapes), shapes[0].packed,
    )  # fmt: skip


def _look_at_evaluation(recipe: Recipe, tokenizer: Any, shapes: Shapes) -> None:
    from mnemic.train.data.formats import FormatError, as_example
    from mnemic.train.objectives.build import eval_rows, eval_stream, sft_tokenizer

    part = recipe.evaluation
    if part is None or isinstance(part.data, HubData):
        return
    count = min(part.max_rows or _ROWS, _ROWS)
    stream, _ = eval_stream(recipe, tokenizer)
    rows = sorted(one_pass(stream, count), key=lambda e: len(e.input_ids))
    chunks = chunks_of(rows, part.batch_size, 1, lambda row: row.operation)
    if not chunks:
        return
    shapes.evaluation = _hull([_shape(chunk, False) for chunk in chunks])
    if part.exact_match and isinstance(recipe.objective, SftObjective):
        convert = sft_tokenizer(recipe.objective, tokenizer)
        lengths = []
        for row in one_pass(eval_rows(recipe, quiet=True), count):
            try:
                lengths.append(len(convert.prompt(as_example(row.fields))))
            except FormatError:
                continue  # a bad row, which the run reports
        if lengths:
            size = min(part.batch_size, len(lengths))
            shapes.prompts = Shape(size, max(lengths), 1, padded=True)


def _waiting_bytes(recipe: Recipe, tokenizer: Any, rows: Sequence[Example]) -> int:
    """The shuffle window's, in Python objects: as many rows as it holds, or as the data has."""
    data, objective = recipe.data, recipe.objective
    if not data.shuffle or not rows or isinstance(data, EpisodesData):
        return 0  # objective grpo's episodes are few
    joined = sum(len(row.lengths) for row in rows)
    tokens = sum(_size(row) for row in rows) / joined
    texts = tokenizer.batch_decode([list(row.input_ids) for row in rows])
    text = max(1.0, sum(len(x.encode()) for x in texts) / joined)
    if isinstance(objective, SftObjective):
        # Rows are shuffled as text; the rows to be joined wait once more, as tokens.
        each = text + _ROW + (tokens if objective.packing else 0)
    else:
        each = tokens
    return int(min(data.shuffle_window, _count(data, text)) * each)


def _count(data: Data, text: float) -> float:
    """Rows that the data have; endless where that is not known before they are read."""
    if isinstance(data, FactsData):
        return data.size
    if isinstance(data, KvStreamData):
        return data.size * data.stream.n_chunks
    if isinstance(data, OperationsData):
        return data.size * len(data.operations)
    if isinstance(data, HubData | EpisodesData):
        return math.inf
    return math.ceil(sum(path.stat().st_size for path in find_files(data.path, "data")) / text)


def _size(row: Example) -> int:
    """Bytes of a row of tokens: two lists, and an object for each id that Python does not share."""
    ids, labels = list(row.input_ids), list(row.labels)
    own = sum(1 for token in ids if token > 256)
    return sys.getsizeof(ids) + sys.getsizeof(labels) + 28 * own + 200
