"""Examples to batches of tensors: padded, or packed with each joined row's positions counted from
0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from mnemic.train.data.tokenize import IGNORE, Example

T = TypeVar("T")


@dataclass(slots=True)
class Batch:
    """One forward's worth of rows.

    `weight` is this batch's part of the loss's denominator (trained tokens); the loss of a step is
    the sum of `Objective.loss` over all batches and ranks, divided by the sum of their weights.
    """

    tensors: dict[str, Tensor]
    weight: float
    counts: dict[str, float] = field(default_factory=dict)
    """Numbers to add up over the step: rows, tokens."""
    operation: str | None = None
    """The expert of an adapter bank that all its rows are for."""

    def to(self, device: Any) -> "Batch":
        moved = {k: v.to(device, non_blocking=True) for k, v in self.tensors.items()}
        return Batch(moved, self.weight, self.counts, self.operation)


def by_operation(
    rows: Sequence[T], operation: Callable[[T], str | None]
) -> list[tuple[str | None, list[T]]]:
    """The rows of each operation, sorted by its name, in their order."""
    found: dict[str | None, list[T]] = {}
    for row in rows:
        found.setdefault(operation(row), []).append(row)
    return sorted(found.items(), key=lambda item: item[0] or "")


def chunks_of(
    rows: Sequence[T], size: int, world: int, operation: Callable[[T], str | None]
) -> list[list[T]]:
    """Rows by operation in chunks of at most `size`, as many for each of `world` ranks: the largest
    are halved until they are. len(rows) must be a multiple of `world`.
    """
    chunks = [
        own[i : i + size]
        for _, own in by_operation(rows, operation)
        for i in range(0, len(own), size)
    ]
    while len(chunks) % world:
        index = max(range(len(chunks)), key=lambda i: len(chunks[i]))
        half = (len(chunks[index]) + 1) // 2
        chunks[index : index + 1] = [chunks[index][:half], chunks[index][half:]]
    return chunks


def collate(examples: list[Example], *, pad_id: int, packed: bool) -> Batch:
    """Right-padded (B, T) int64 `input_ids` and `labels`, and `attention_mask` or, packed,
    `position_ids`.

    `logit_columns` (C,) int64 names the columns whose logits some row needs, where that is not all
    of them.

    Padding is masked by length, never by comparing with the pad id (which is often the end token).
    In a packed batch the padding is one more joined row, so it attends to nothing else and nothing
    to it.
    """
    length = max(len(e.input_ids) for e in examples)
    shape = (len(examples), length)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    labels = torch.full(shape, IGNORE, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.int64)
    positions = torch.zeros(shape, dtype=torch.int64)
    for i, example in enumerate(examples):
        size = len(example.input_ids)
        input_ids[i, :size] = torch.tensor(example.input_ids)
        labels[i, :size] = torch.tensor(example.labels)
        mask[i, :size] = 1
        if packed:
            spans = [*example.lengths, length - size]
            positions[i] = torch.cat([torch.arange(span) for span in spans])
    tensors = {"input_ids": input_ids, "labels": labels}
    if packed:
        tensors["position_ids"] = positions
    elif not bool(mask.all()):
        tensors["attention_mask"] = mask
    columns = (labels[:, 1:] != IGNORE).any(0).nonzero().squeeze(1)
    if len(columns) < length - 1:
        # Found here, on the CPU, so that the device need not be asked.
        tensors["logit_columns"] = columns
    weight = float(sum(e.num_targets for e in examples))
    tokens = float(sum(len(e.input_ids) for e in examples))
    counts = {"rows": float(len(examples)), "tokens": tokens}
    operation = examples[0].operation
    assert all(example.operation == operation for example in examples)
    return Batch(tensors, weight, counts, operation)


def pack_rows(examples: list[Example], max_length: int) -> list[Example]:
    """Join examples into rows of at most `max_length` tokens, best fit by decreasing length.

    The first label of each joined example is `IGNORE` already, so no example predicts its
    neighbour. All are of one operation.
    """
    bins: list[list[Example]] = []
    by_room: dict[int, list[int]] = {}
    for example in sorted(examples, key=lambda e: -len(e.input_ids)):
        size = len(example.input_ids)
        room = min((r for r, held in by_room.items() if held and r >= size), default=None)
        if room is None:
            bins.append([])
            index, room = len(bins) - 1, max_length
        else:
            index = by_room[room].pop()
        bins[index].append(example)
        by_room.setdefault(room - size, []).append(index)
    return [
        Example(
            [t for e in group for t in e.input_ids],
            [t for e in group for t in e.labels],
            tuple(len(e.input_ids) for e in group),
            sum(e.source_length for e in group),
            group[0].operation,
        )
        for group in bins
    ]
