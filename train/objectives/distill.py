"""Objective `distill`: the student learns a teacher's whole next-token distributions, on given
completions or on its own, after GKD (arXiv 2306.13649).

What is equal to TRL's and its conventions: models/exact/divergence.py. Different from it: which
completions are sampled is drawn row by row, not batch by batch; samples are drawn at temperature 1
whatever the divergence's; the sum is divided by the tokens that were trained (TRL's GKDTrainer
divides sampled ones by the number of the data's). Nothing is kept between steps: what a row samples
depends on the weights and on (seed, step, row) alone, so a resumed run samples it again.
"""

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mnemic.models.exact.divergence import (
    Divergence,
    at_head,
    chunked_divergence,
    chunked_losses,
    head_of,
)
from mnemic.models.exact.loss import loss_head
from mnemic.models.generation import generate
from mnemic.train.data.collate import Batch, by_operation, chunks_of, collate
from mnemic.train.data.stream import Stage, take
from mnemic.train.data.tokenize import IGNORE, Example
from mnemic.train.objectives.base import TokenBatch
from mnemic.train.objectives.tokens import TokenObjective, activate, base_of, token_batch
from mnemic.train.rollout.play import seed_of

SAMPLED = "distill_sampled"
"""Of the batch's tensors: which rows (B,), bool, are the student's own."""


@dataclass(frozen=True)
class Sampler:
    """Replaces a `share` of rows' completions by the student's own. `model`: without wrappers;
    `max_length` bounds a row, prompt included.
    """

    model: Any
    tokenizer: Any
    share: float
    max_new_tokens: int
    max_length: int
    seed: int
    autocast: Callable[[], Any] = nullcontext
    batch_size: int = 16

    def chosen(self, step: int, number: int) -> bool:
        """Whether row `number` of step `step`'s global batch is sampled."""
        return random.Random(f"{self.seed}/{step}/{number}/on_policy").random() < self.share

    def __call__(self, step: int, rows: Sequence[tuple[int, Example]]) -> list[Example]:
        """Of `rows` with their numbers, each with a completion sampled for it. All are of one
        operation.
        """
        prompts = [row.input_ids[: _prompt_length(row)] for _, row in rows]
        seeds = [seed_of(f"{self.seed}/{step}/{number}") for number, _ in rows]
        if rows[0][1].operation is not None:
            self.model.expert_bank.activate(rows[0][1].operation)
        with self.autocast():
            made = generate(
                self.model, prompts, eos_id=self.tokenizer.eos_token_id,
                pad_id=self.tokenizer.pad_token_id, max_new_tokens=self.max_new_tokens,
                batch_size=self.batch_size, seeds=seeds,
            )  # fmt: skip
        found = []
        for prompt, completion, (_, row) in zip(prompts, made, rows, strict=True):
            new = completion.ids[: self.max_length - len(prompt)]
            ids, labels = prompt + new, [IGNORE] * len(prompt) + new
            found.append(Example(ids, labels, (len(ids),), len(ids), row.operation))
        return found


def _operation(row: tuple[int, Example]) -> str | None:
    return row[1].operation


def _prompt_length(row: Example) -> int:
    return next(i for i, label in enumerate(row.labels) if label != IGNORE)


class DistillationObjective(TokenObjective):
    """(1 - `hard_weight`) divergence + `hard_weight` cross-entropy, summed over trained tokens;
    the divergence alone on rows that `sampler` wrote.

    `teacher`: a causal LM on the student's device, with the same vocabulary. `rows`: keywords of
    `TokenObjective`.
    """

    def __init__(
        self, stream: Stage[Example], teacher: Any, divergence: Divergence, *,
        hard_weight: float = 0.0, sampler: Sampler | None = None, **rows: Any,
    ) -> None:  # fmt: skip
        super().__init__(stream, **rows)
        self.teacher = teacher.requires_grad_(False).eval()
        self.divergence, self.hard_weight, self.sampler = divergence, hard_weight, sampler

    def microbatches(self, step: int) -> list[Batch]:
        if self.sampler is None:
            return super().microbatches(step)
        numbered = sorted(
            enumerate(take(self.stream, self.batch_size)), key=lambda r: len(r[1].input_ids)
        )
        # Ranks share the rows as they are given: which rank samples one does not depend on samples.
        chunks = chunks_of(numbered, self.micro, self.world, _operation)[self.rank :: self.world]
        sizes = by_operation(chunks, lambda chunk: _operation(chunk[0]))
        found = []
        for _, own in sizes:
            rows = self._sampled(self.sampler, step, [row for chunk in own for row in chunk])
            for chunk in own:
                found.append(self._batch(rows[: len(chunk)]))
                rows = rows[len(chunk) :]
        return found

    def _sampled(
        self, sampler: Sampler, step: int, given: Sequence[tuple[int, Example]]
    ) -> list[tuple[bool, Example]]:
        """Rows of one operation, some of them sampled anew, by their length, and whether they
        are.
        """
        drawn = [row for row in given if sampler.chosen(step, row[0])]
        rows = [(False, row[1]) for row in given if not sampler.chosen(step, row[0])]
        rows += [(True, row) for row in sampler(step, drawn)] if drawn else []
        return sorted(rows, key=lambda row: len(row[1].input_ids))

    def _batch(self, rows: list[tuple[bool, Example]]) -> Batch:
        batch = collate([row for _, row in rows], pad_id=self.pad_id, packed=self.packed)
        batch.tensors[SAMPLED] = torch.tensor([own for own, _ in rows])
        batch.counts["distill/sampled_rows"] = float(sum(own for own, _ in rows))
        return batch

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        activate(model, batch)
        own = {k: v for k, v in batch.tensors.items() if k != SAMPLED}
        found = token_batch(Batch(own, batch.weight))
        teacher, student = base_of(self.teacher), base_of(model)
        seen: list[Tensor] = []
        with torch.no_grad(), at_head(teacher, lambda h: seen.append(_trained(found, h)[0])):
            self.teacher(**found.inputs, use_cache=False)
        sampled = batch.tensors.get(SAMPLED)
        result: list[tuple[Tensor, dict[str, float]]] = []

        def compare(hidden: Tensor) -> Tensor:
            rows, targets = _trained(found, hidden)
            hard = targets if sampled is None else _given(found, sampled)
            result.append(self._compare(rows, student, seen.pop(), teacher, hard))
            return result[0][0]

        with at_head(student, compare):
            model(**found.inputs, use_cache=False)
        return result[0]

    def _compare(
        self, rows: Tensor, student: Any, others: Tensor, teacher: Any, targets: Tensor
    ) -> tuple[Tensor, dict[str, float]]:
        """From the hidden states of both at the trained tokens; `targets` (N,) are `IGNORE` where
        cross-entropy does not count.
        """
        heads = rows, head_of(student), others, head_of(teacher)
        chunk = None if loss_head(student).wanted(len(rows)) else 0
        if not self.hard_weight:
            total = chunked_divergence(*heads, self.divergence, chunk=chunk).sum()
            return total, {"distill/divergence_sum": float(total.detach())}
        both = chunked_losses(*heads, targets, self.divergence, chunk=chunk)
        weight = self.hard_weight * (targets != IGNORE)
        total = ((1 - weight) * both[:, 0] + weight * both[:, 1]).sum()
        soft, hard = both.detach().sum(0).tolist()
        return total, {"distill/divergence_sum": soft, "distill/cross_entropy_sum": hard}

    def tokens(self, batch: Batch) -> TokenBatch:
        raise TypeError("a divergence is no function of the targets' log-probabilities")


def _trained(found: TokenBatch, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states (N, H) and targets (N,) of the trained tokens alone: two heads on columns that
    only other rows train would be dear.
    """
    rows, targets = found.pick(hidden)
    kept = targets != IGNORE
    return rows[kept], targets[kept]


def _given(found: TokenBatch, sampled: Tensor) -> Tensor:
    """Targets (N,) of the trained tokens, `IGNORE` in rows that the student wrote."""
    every = found.targets[found.targets != IGNORE]
    own = sampled[:, None].expand(found.targets.shape)[found.targets != IGNORE]
    return every.masked_fill(own, IGNORE)
