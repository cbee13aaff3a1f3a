"""A step over a model of which one layer is in memory at a time.

    forward    for each layer l: for each micro-batch: keep the layer's input, run the layer
    head       log-probabilities tile by tile, then gradients tile by tile (vocabulary.py)
    backward   for each layer l, last first: for each micro-batch: run it again, with gradients;
               with the last micro-batch each gradient is used and freed when it is ready
    embedding  tile by tile

All micro-batches of a layer before the next layer (GreedySnake's vertical order, arXiv 2512.17570)
is the only order in which gradients can be both accumulated and used inside the backward: the
accumulator is one layer, and weights are read twice a step whatever the number of micro-batches.
The next layer is being read, and the last one written, while one is computed.

What a layer gets beside the hidden states (masks, rotary angles, positions) is taken from the
model's own forward, run with layers that only note their arguments.
"""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mnemic.models.exact.attention import by_name
from mnemic.models.tokens.forward import Forward
from mnemic.models.tokens.rows import take
from mnemic.models.tokens.selected import run_observed, run_selected, spread
from mnemic.models.tokens.sparsity import TokenSparsity
from mnemic.train.data.collate import Batch
from mnemic.train.data.tokenize import IGNORE
from mnemic.train.objectives.base import Objective, TokenBatch
from mnemic.train.offload.activations import LayerInputs
from mnemic.train.offload.cache import Cache
from mnemic.train.offload.io import Trace
from mnemic.train.offload.layout import Spec
from mnemic.train.offload.skeleton import Anatomy, placeholder, set_forward
from mnemic.train.offload.vocabulary import HeadInput, Vocabulary


class _Captured(Exception):
    """The model's own forward has come to its last layer: nothing more is wanted of it."""


@dataclass
class Front:
    """What comes before the layers, for one micro-batch: the first hidden states with the graph
    that leads to `rows` (embedding rows of `ids`), and each layer's further arguments.
    """

    batch: TokenBatch
    ids: Tensor
    rows: nn.Parameter
    hidden: Tensor | None = None
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    tokens: Forward | None = None
    """Which tokens gradients go through; None for all."""


class Streamer:
    """Runs `anatomy` with layers from `layers` (a cache over the pieces `block/<l>`, laid out by
    `specs`) and its vocabulary in tiles. `on_gradient(parameter)` is called inside the backward of
    a step's last micro-batch, for each streamed parameter that is trained.
    """

    def __init__(
        self, anatomy: Anatomy, specs: Sequence[Sequence[Spec]], layers: Cache,
        vocabulary: Vocabulary, inputs: LayerInputs, *, device: torch.device,
        autocast: Callable[[], Any] = nullcontext, trace: Trace | None = None,
    ) -> None:  # fmt: skip
        self.anatomy, self.specs, self.cache = anatomy, specs, layers
        self.vocabulary, self.inputs, self.device = vocabulary, inputs, device
        self.autocast, self.trace = autocast, trace
        self.on_gradient: Callable[[nn.Parameter], None] | None = None
        self.sparsity: TokenSparsity | None = None
        """Of a run with `tokens`: layers then run again for selected tokens only."""
        self._armed = False
        self._front: Front | None = None
        self._last: Tensor | None = None
        self._capturing = False
        self._params = [dict(anatomy.layer_parameters(i)) for i in range(len(specs))]
        self._empty = [
            {s.name: placeholder(self._params[i][s.name].data) for s in specs[i]}
            for i in range(len(specs))
        ]
        self._layer_forward = [
            set_forward(layer, self._forward_of(index))
            for index, layer in enumerate(anatomy.layers)
        ]
        self._embed = set_forward(anatomy.embedding, self._embedding_forward)
        set_forward(anatomy.head, vocabulary.logits)
        for index, named in enumerate(self._params):
            for spec in specs[index]:
                param = named[spec.name]
                if param.requires_grad:
                    param.register_post_accumulate_grad_hook(self._gradient_ready)
        anatomy.model.streamer = self

    def named(self, index: int) -> dict[str, nn.Parameter]:
        """Parameters of layer `index` by full name."""
        return self._params[index]

    # Layers ----------------------------------------------------------------------------------

    @property
    def num_layers(self) -> int:
        return len(self.specs)

    @contextmanager
    def layer(self, index: int, ahead: Sequence[int] = ()) -> Iterator[None]:
        """Layer `index` in memory; those of `ahead` are being read meanwhile."""
        piece = f"block/{index}"
        buffer = self.cache.acquire(piece)
        for other in ahead:
            if 0 <= other < self.num_layers:
                self.cache.prefetch(f"block/{other}")
        named, start = self._params[index], time.perf_counter()
        for spec in self.specs[index]:
            named[spec.name].data = spec.view(buffer)
        try:
            yield
        finally:
            for spec in self.specs[index]:
                named[spec.name].data = self._empty[index][spec.name]
            self.cache.release(piece)
            if self.trace:
                self.trace.add("layer", piece, start)

    def _ahead(self, index: int, direction: int) -> list[int]:
        depth = 1 if len(self.cache.slots) < 4 else 2
        return [index + direction * (i + 1) for i in range(depth)]

    def _run(self, index: int, hidden: Tensor, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
        args, kwargs = call
        with self.autocast():
            found = self._layer_forward[index](hidden, *args, **kwargs)
        return found[0] if isinstance(found, tuple) else found

    def _seed(self, index: int, micro: int) -> None:
        """Dropout draws the same numbers when a layer is run again."""
        key = f"{torch.initial_seed() if self._base is None else self._base}/{index}/{micro}"
        torch.manual_seed(random.Random(key).getrandbits(63))

    _base: int | None = None

    def _forward_of(self, index: int) -> Callable[..., Any]:
        """What runs when the model calls its layer: noting, handing over, or streaming it."""

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            front = self._front
            if self._capturing and front is not None:
                front.hidden = hidden_states if index == 0 else front.hidden
                front.calls.append((args, kwargs))
                if index == self.num_layers - 1:
                    raise _Captured
                return hidden_states
            if self._last is not None:
                return self._last if index == self.num_layers - 1 else hidden_states
            with self.layer(index, self._ahead(index, 1)), self.autocast():
                return self._layer_forward[index](hidden_states, *args, **kwargs)

        forward.own = self.anatomy.layers[index].forward  # type: ignore[attr-defined]
        return forward

    def _embedding_forward(self, ids: Tensor) -> Tensor:
        """The embedding's own forward, over the rows that are needed."""
        front = self._front
        if front is not None:
            distinct, weight = front.ids, front.rows
        else:
            distinct = ids.unique()
            weight = nn.Parameter(self.vocabulary.rows(distinct), requires_grad=False)
        module = self.anatomy.embedding
        own, padding = module.weight, module.padding_idx
        module.weight = weight
        if padding is not None:
            # Its row gets no gradient: say where that row is now.
            place = (distinct == padding).nonzero()
            module.padding_idx = int(place[0, 0]) if len(place) else None
        try:
            return self._embed(torch.searchsorted(distinct, ids))
        finally:
            module.weight, module.padding_idx = own, padding

    # A step ----------------------------------------------------------------------------------

    def _begin(self, batches: Sequence[TokenBatch]) -> list[Front]:
        ids = [batch.inputs["input_ids"].unique() for batch in batches]
        everything = torch.cat(ids).unique()
        rows = self.vocabulary.rows(everything)
        trained = self.anatomy.embedding.weight.requires_grad
        fronts = []
        for batch, own in zip(batches, ids, strict=True):
            part = rows[torch.searchsorted(everything, own)]
            front = Front(batch, own, nn.Parameter(part, requires_grad=trained))
            self._front, self._capturing = front, True
            try:
                with self.autocast():
                    self.anatomy.base(**batch.inputs, use_cache=False)
            except _Captured:
                sparsity = self.sparsity
                if sparsity is not None and sparsity.begin(batch.inputs, batch.predicting()):
                    front.tokens = sparsity.forward
                fronts.append(front)
            finally:
                self._front, self._capturing = None, False
        assert len(fronts) == len(batches)
        return fronts

    def _finish(self, front: Front, last: Tensor) -> Tensor:
        """The model's last hidden state, from its last layer's output."""
        self._front, self._last = front, last
        try:
            with self.autocast():
                return self.anatomy.base(**front.batch.inputs, use_cache=False).last_hidden_state
        finally:
            self._front, self._last = None, None

    def run(
        self, batches: Sequence[Batch], objective: Objective, scale: float, *,
        head_step: Callable[[int, Tensor, Tensor], None] | None = None,
        check: Callable[[Tensor], None] = lambda _: None,
        after_layer: Callable[[str], None] = lambda _: None,
        before_layer: Callable[[str], None] = lambda _: None,
    ) -> tuple[Tensor, dict[str, float], list[HeadInput], list[Front]]:  # fmt: skip
        """Forward and backward of a step; gradients go to `on_gradient` and `head_step` on the way.

        Returns the sum of losses, the objective's counts, and what the vocabulary's own update
        needs. `check(loss)` may stop the step before anything has changed. `before_layer(name)` and
        `after_layer(name)` frame each block's gradients, the block being in memory.
        """
        self._base = torch.initial_seed()
        if self.sparsity is not None:
            self.sparsity.new_step()
        with torch.enable_grad():
            fronts = self._begin([objective.tokens(batch) for batch in batches])
        hiddens = [front.hidden.detach() for front in fronts]  # type: ignore[union-attr]
        for index in range(self.num_layers):
            with torch.no_grad(), self.layer(index, self._ahead(index, 1)):
                for micro, front in enumerate(fronts):
                    self.inputs.put(index, micro, hiddens[micro])
                    self._seed(index, micro)
                    hiddens[micro] = self._forward(index, front, hiddens[micro])
        leaves = [hidden.detach().requires_grad_() for hidden in hiddens]
        del hiddens
        tails, head_inputs = [], []
        with torch.enable_grad():
            for front, leaf in zip(fronts, leaves, strict=True):
                hidden, targets = front.batch.pick(self._finish(front, leaf))
                tails.append(hidden)
                head_inputs.append(HeadInput(hidden.detach(), targets))
        loss_sum, counts = self._loss(batches, objective, scale, head_inputs)
        check(loss_sum)
        grads = self.vocabulary.backward(head_inputs, head_step)
        for tail, grad in zip(tails, grads, strict=True):
            torch.autograd.backward([tail], [grad])
        del tails, grads
        flowing = [leaf.grad for leaf in leaves]
        del leaves
        for index in reversed(range(self.num_layers)):
            name = f"block/{index}"
            with self.layer(index, self._ahead(index, -1)):
                self.cache.settle(name)
                before_layer(name)
                for micro, front in enumerate(fronts):
                    last = micro == len(fronts) - 1
                    flowing[micro] = self._backward(index, micro, front, flowing[micro], last)
                after_layer(name)
        for front, grad in zip(fronts, flowing, strict=True):
            hidden = front.hidden
            if hidden is not None and hidden.requires_grad:
                torch.autograd.backward([hidden], [grad])
            front.hidden, front.calls, front.tokens = None, [], None
        torch.manual_seed(self._base)
        self._base = None
        return loss_sum, counts, head_inputs, fronts

    def _loss(
        self, batches: Sequence[Batch], objective: Objective, scale: float,
        head_inputs: Sequence[HeadInput],
    ) -> tuple[Tensor, dict[str, float]]:  # fmt: skip
        """Losses from log-probabilities, and into `head_inputs` their derivatives."""
        total = torch.zeros((), device=self.device)
        sums: dict[str, float] = {}
        found = self.vocabulary.logprobs(head_inputs)
        for batch, item, logprobs in zip(batches, head_inputs, found, strict=True):
            with torch.enable_grad():
                kept = item.targets != IGNORE
                leaf = logprobs[kept].requires_grad_()
                loss, counts = objective.loss_of(leaf, batch)
                item.coefficient = torch.zeros_like(logprobs)
                item.coefficient[kept] = torch.autograd.grad(loss * scale, leaf)[0]
            total += loss.detach()
            for key, value in {**batch.counts, **counts}.items():
                sums[key] = sums.get(key, 0.0) + value
        return total, sums

    def _backward(
        self, index: int, micro: int, front: Front, grad: Tensor | None, last: bool
    ) -> Tensor | None:
        """Layer `index` again, with gradients; dL/d(its input)."""
        first = front.hidden
        needed = index > 0 or (first is not None and first.requires_grad)
        hidden = self.inputs.take(index, micro).detach().requires_grad_(needed)
        self._seed(index, micro)
        self._armed = last
        try:
            chosen = None
            if front.tokens is not None and self.sparsity is not None:
                chosen = self.sparsity.chosen(front.tokens, index)
            if chosen is not None:
                return self._backward_selected(index, front, hidden, chosen, grad)
            with torch.enable_grad():
                out = self._run(index, hidden, front.calls[index])
            torch.autograd.backward([out], [grad])
        finally:
            self._armed = False
        return hidden.grad

    def _forward(self, index: int, front: Front, hidden: Tensor) -> Tensor:
        """Layer `index` in a step's forward."""
        if front.tokens is not None and self.sparsity is not None:
            layer = self.anatomy.layers[index]
            named = by_name(layer, *front.calls[index])
            with self.autocast():
                look = self.sparsity.look(front.tokens, index, layer, hidden, named)
                if look is not None:
                    return run_observed(layer, named, look, hidden)
        return self._run(index, hidden, front.calls[index])

    def _backward_selected(
        self, index: int, front: Front, hidden: Tensor, chosen: Tensor, grad: Tensor | None
    ) -> Tensor | None:
        """`_backward` of the tokens at `chosen` (B, K); the others' gradients are zero."""
        assert grad is not None
        layer, needed = self.anatomy.layers[index], hidden.requires_grad
        named = by_name(layer, *front.calls[index])
        with self.autocast():
            rows, out = run_selected(layer, named, chosen, hidden, needed=needed)
        torch.autograd.backward([out], [take(grad, chosen)])
        return spread(rows.grad, chosen, hidden.detach()) if rows.grad is not None else None

    def _gradient_ready(self, param: Tensor) -> None:
        if self._armed and self.on_gradient is not None:
            assert isinstance(param, nn.Parameter)
            self.on_gradient(param)

    # Without gradients -----------------------------------------------------------------------

    @torch.no_grad()
    def logprobs(self, batch: TokenBatch) -> Tensor:
        """log p of the batch's targets, fp32 (N,): for evaluation."""
        with self.autocast():
            hidden = self.anatomy.base(**batch.inputs, use_cache=False).last_hidden_state
        picked, targets = batch.pick(hidden)
        return self.vocabulary.logprobs([HeadInput(picked, targets)])[0][targets != IGNORE]
