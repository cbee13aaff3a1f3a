"""Objectives over token rows, `lm` and `sft`: one stream of `Example`s, one cross-entropy."""

import inspect
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mnemic.models.exact.loss import loss_head
from mnemic.train.data.collate import Batch, chunks_of, collate
from mnemic.train.data.rows import BadRows
from mnemic.train.data.stream import Stage, take
from mnemic.train.data.tokenize import IGNORE, Example
from mnemic.train.objectives.base import Objective, TokenBatch


class TokenObjective(Objective):
    """Cross-entropy over the labelled tokens of a stream of examples.

    Of each global batch of `batch_size` rows, sorted by length so that little is padding, rank r
    takes micro-batches r, r + world, ...
    """

    def __init__(
        self,
        stream: Stage[Example],
        *,
        batch_size: int,
        micro_batch_size: int,
        pad_id: int,
        packed: bool,
        bad: BadRows,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.stream, self.batch_size, self.micro = stream, batch_size, micro_batch_size
        self.pad_id, self.packed, self.bad = pad_id, packed, bad
        self.rank, self.world = rank, world

    def microbatches(self, step: int) -> list[Batch]:
        del step  # the stream knows where it stands
        rows = sorted(take(self.stream, self.batch_size), key=lambda e: len(e.input_ids))
        chunks = chunks_of(rows, self.micro, self.world, lambda row: row.operation)
        mine = chunks[self.rank :: self.world]
        return [collate(chunk, pad_id=self.pad_id, packed=self.packed) for chunk in mine]

    def loss(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        activate(model, batch)
        return token_loss(model, batch), {}

    def tokens(self, batch: Batch) -> TokenBatch:
        # A streamed bank has one expert, which is active.
        return token_batch(batch)

    def metrics(self) -> dict[str, float]:
        found = {"data/bad_rows": self.bad.count, "data/truncated_rows": self.bad.truncated}
        return {key: float(value) for key, value in found.items() if value}

    def state_dict(self) -> dict[str, Any]:
        return {"stream": self.stream.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state["stream"])


@lru_cache(maxsize=8)
def _accepts_logits_to_keep(forward_class: type) -> bool:
    return "logits_to_keep" in inspect.signature(forward_class.forward).parameters  # type: ignore[attr-defined]


def base_of(model: Any) -> Any:
    """The transformers model under DDP and peft wrappers."""
    model = getattr(model, "module", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def activate(model: Any, batch: Batch) -> None:
    """Let the expert of an adapter bank compute that the batch is for, until the next batch: its
    backward comes when the loss has returned.
    """
    if batch.operation is not None:
        getattr(model, "module", model).expert_bank.activate(batch.operation)


def token_batch(batch: Batch) -> TokenBatch:
    """The batch's model inputs and targets."""
    inputs = {k: v for k, v in batch.tensors.items() if k not in ("labels", "logit_columns")}
    targets = batch.tensors["labels"][:, 1:]
    columns = batch.tensors.get("logit_columns")
    return TokenBatch(inputs, columns, targets if columns is None else targets[:, columns])


def token_loss(model: Any, batch: Batch) -> Tensor:
    """Sum of the next-token cross-entropies at labelled tokens, fp32.

    The head runs only at columns in which some row has a target (exact: other logits have no
    gradient), and past some 16 M logits never on all of them at once (models/exact/loss.py).
    """
    found = token_batch(batch)
    streamer = getattr(base_of(model), "streamer", None)
    if streamer is not None:
        return -streamer.logprobs(found).sum()
    return _losses(model, found, summed=True)[0]


def token_logprobs(model: Any, found: TokenBatch) -> Tensor:
    """log p of the batch's targets, fp32 (N,), with gradients: for objectives that are functions of
    them.
    """
    streamer = getattr(base_of(model), "streamer", None)
    if streamer is not None:
        return streamer.logprobs(found)
    losses, targets = _losses(model, found, summed=False)
    return -losses[targets != IGNORE]


def _losses(model: Any, found: TokenBatch, *, summed: bool) -> tuple[Tensor, Tensor]:
    """Cross-entropies fp32 of some rows (N,), or their sum; and the rows' targets (N,)."""
    base = base_of(model)
    sparsity = base.__dict__.get("token_sparsity")
    if sparsity is not None and not sparsity.begin(found.inputs, found.predicting()):
        sparsity = None
    keeps = _accepts_logits_to_keep(type(base))
    columns = found.columns if keeps else None
    kwargs = {} if columns is None else {"logits_to_keep": columns}
    head, targets = loss_head(base), found.targets

    def pick(hidden: Tensor) -> tuple[Tensor, Tensor]:
        """When the layers have run, and it is known which tokens they kept."""
        nonlocal targets
        trained = found if sparsity is None else _trained(found, sparsity)
        if columns is None:
            hidden, targets = trained.pick(hidden)
        else:
            hidden, targets = hidden.flatten(0, 1), trained.targets.reshape(-1)
        return hidden, targets

    rows = found.targets.numel() if keeps else found.inputs["input_ids"].numel()
    if head.wanted(rows):
        with head.asking(pick, summed=summed) as answer:
            model(**found.inputs, use_cache=False, **kwargs)
        assert answer.losses is not None
        losses = answer.losses
    else:
        logits, targets = pick(model(**found.inputs, use_cache=False, **kwargs).logits)
        if found.columns is None:
            # The last column has no target: not a copy of it.
            batch, width = found.inputs["input_ids"].shape
            logits = logits.view(batch, width, -1)[:, :-1].flatten(0, 1)
            targets = targets.view(batch, width)[:, :-1].reshape(-1)
        losses = F.cross_entropy(
            logits.float(), targets, ignore_index=IGNORE, reduction="sum" if summed else "none"
        )
    return losses if sparsity is None else losses * sparsity.loss_factor, targets


def _trained(found: TokenBatch, sparsity: Any) -> TokenBatch:
    """Without the targets of positions that token sparsity took out of the loss."""
    dropped = sparsity.loss_dropped()
    if dropped is None:
        return found
    dropped = dropped[:, :-1] if found.columns is None else dropped[:, found.columns]
    return replace(found, targets=found.targets.masked_fill(dropped, IGNORE))


@torch.no_grad()
def keeps_packed_rows_apart(model: Any) -> bool:
    """Whether positions that restart at 0 separate the rows of a packed batch in this model.

    Changing the first of two packed rows must leave the logits of the second equal to the last bit.
    """
    device = next(model.parameters()).device
    second = [5, 6, 7, 8, 9]
    positions = torch.arange(5, device=device).repeat(2)[None]
    was_training = model.training
    model.eval()
    try:
        logits = [
            model(
                input_ids=torch.tensor([first + second], device=device),
                position_ids=positions,
                use_cache=False,
            ).logits[:, 5:]
            for first in ([0, 1, 2, 3, 4], [9, 8, 7, 6, 5])
        ]
    finally:
        model.train(was_training)
    return torch.equal(logits[0], logits[1])
