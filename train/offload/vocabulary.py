"""Embedding and head in row tiles: rows of the batch in, log-probabilities out, no full logits.

The loss's only view of the head is log p(target) of each token. A first sweep over the tiles finds
it by an online log-sum-exp; a second one, given dL/dlog p, remakes each tile of the logits and
gives the gradients of hidden states and of the tile, which is stepped at once (after Cut Cross
Entropy, arXiv 2411.09009; and MemAscend, arXiv 2505.23254, found the embedding to size every
buffer). The second sweep goes backwards, so that it begins with the tiles that the first one left
in memory. With a single tile the arithmetic is that of `F.cross_entropy`, bit for bit.

A tied matrix gets both of its gradients in one place, in `update` at the end of the step.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnemic.models.exact.loss import Scaling
from mnemic.optim.tiled import TiledStep
from mnemic.train.offload.apply import Applier
from mnemic.train.offload.cache import Cache
from mnemic.train.offload.layout import Tiling
from mnemic.train.offload.memory import ALIGN, aligned_buffer, round_up
from mnemic.train.offload.store import Store

_LOGITS = 1 << 22
"""Elements of a tile of logits: more tokens than that allows are worked on in parts."""

TilesOf = Callable[[bool], Iterable[tuple[int, Tensor, Tensor]]]
"""Gives (tile, weight, gradient), each time it is called; True: tiles of zeros may be left out."""

Measure = Callable[[str, Tensor], Tensor]
"""Takes (name, gradient tile): notes its norm, returns it clipped."""


@dataclass
class Matrix:
    """An embedding or head. `param` is the skeleton's placeholder, which optimizer groups hold."""

    name: str
    param: nn.Parameter
    tiling: Tiling

    def piece(self, tile: int) -> str:
        return f"rows/{self.name}/{tile}"


@dataclass
class HeadInput:
    """What the head sees of a micro-batch: hidden states (N, H), targets (N,), and later log p's
    normaliser and dL/dlog p, both fp32 (N,).
    """

    hidden: Tensor
    targets: Tensor
    normalizer: Tensor | None = None
    coefficient: Tensor | None = None


class Vocabulary:
    """`embedding` and `head` are one object where they are tied. `scaling` of the
    logits; `bias` (V,) or None; `autocast` makes the context of each product.
    """

    def __init__(
        self, embedding: Matrix, head: Matrix, store: Store, cache: Cache, *,
        bias: Tensor | None = None, scaling: Scaling | None = None,
        autocast: Callable[[], Any] = nullcontext,
    ) -> None:  # fmt: skip
        self.embedding, self.head, self.store, self.cache = embedding, head, store, cache
        scaling = scaling or Scaling()
        self.bias, self.factor, self.cap = bias, scaling.factor, scaling.cap
        self.autocast = autocast

    @property
    def tied(self) -> bool:
        return self.embedding is self.head

    # Tiles -----------------------------------------------------------------------------------

    def tiles(
        self, matrix: Matrix, *, backwards: bool = False, chosen: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """(tile, weight rows) one after the other, the next being read meanwhile; all or `chosen`
        ones.
        """
        order: Sequence[int] = range(len(matrix.tiling)) if chosen is None else chosen
        order = order[::-1] if backwards else order
        for position, tile in enumerate(order):
            piece = matrix.piece(tile)
            buffer = self.cache.acquire(piece)
            for ahead in order[position + 1 : position + 3]:
                self.cache.prefetch(matrix.piece(ahead))
            try:
                yield tile, self._view(matrix, tile, buffer)
            finally:
                self.cache.release(piece)

    def _view(self, matrix: Matrix, tile: int, buffer: Tensor) -> Tensor:
        part, dtype = matrix.tiling.slice(tile), matrix.param.dtype
        rows = part.stop - part.start
        flat = buffer[: rows * matrix.tiling.cols * dtype.itemsize]
        return flat.view(dtype).view(rows, matrix.tiling.cols)

    def rows(self, ids: Tensor) -> Tensor:
        """Embedding rows of the sorted, distinct `ids` (U,): a copy, (U, H)."""
        matrix, tiling = self.embedding, self.embedding.tiling
        width = tiling.cols * matrix.param.dtype.itemsize
        found = torch.empty(len(ids), tiling.cols, dtype=matrix.param.dtype, device=ids.device)
        wanted = ids.cpu()
        bounds = torch.arange(0, tiling.rows + tiling.step, tiling.step)
        edges = torch.searchsorted(wanted, bounds).tolist()
        tiles = [t for t in range(len(tiling)) if edges[t] < edges[t + 1]]
        for position, tile in enumerate(tiles):
            low, high = edges[tile], edges[tile + 1]
            piece, local = matrix.piece(tile), wanted[low:high] - tile * tiling.step
            sparse = (high - low) * (width + 2 * ALIGN) * 2 < tiling.step * width
            if sparse and not self.cache.holds(piece):
                self._read_rows(piece, local.tolist(), width, found[low:high])
                continue
            buffer = self.cache.acquire(piece)
            for ahead in tiles[position + 1 : position + 2]:
                self.cache.prefetch(matrix.piece(ahead))
            found[low:high] = self._view(matrix, tile, buffer)[local.to(buffer.device)]
            self.cache.release(piece)
        return found

    def _read_rows(self, piece: str, rows: list[int], width: int, into: Tensor) -> None:
        """Few rows of a tile: read the pages they lie in, not the tile."""
        limit = self.store.plan.pieces[piece].padded
        flat = into.cpu().view(-1, into.shape[-1]) if into.device.type != "cpu" else into
        for index, row in enumerate(rows):
            start = row * width // ALIGN * ALIGN
            stop = min(limit, round_up((row + 1) * width))
            buffer = aligned_buffer(stop - start)
            self.store.read_span(piece, start, buffer).wait()
            offset = row * width - start
            flat[index] = buffer[offset : offset + width].view(into.dtype)
        if flat is not into:
            into.copy_(flat)

    # The head --------------------------------------------------------------------------------

    def _raw(self, hidden: Tensor, weight: Tensor, part: slice) -> Tensor:
        with self.autocast():
            return F.linear(hidden, weight, None if self.bias is None else self.bias[part])

    def _scaled(self, raw: Tensor) -> Tensor:
        """What the model makes of its raw logits, in their dtype."""
        if self.factor != 1.0:
            raw = raw * self.factor
        if self.cap is not None:
            raw = torch.tanh(raw / self.cap) * self.cap
        return raw

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Raw logits (..., V) of `hidden` (..., H), before the model scales them: for generation,
        where only the last position has any.
        """
        out: Tensor | None = None
        for tile, weight in self.tiles(self.head):
            part = self.head.tiling.slice(tile)
            raw = self._raw(hidden, weight, part)
            if out is None:
                out = raw.new_empty((*raw.shape[:-1], self.head.tiling.rows))
            out[..., part] = raw
        assert out is not None
        return out

    def _parts(self, count: int) -> Iterable[slice]:
        step = max(1, _LOGITS // self.head.tiling.step)
        return (slice(i, min(count, i + step)) for i in range(0, count, step))

    @torch.no_grad()
    def logprobs(self, inputs: Sequence[HeadInput]) -> list[Tensor]:
        """log p(target), fp32 (N,), of each micro-batch; keeps what `backward` needs in `inputs`.

        Plain torch's softmax in fp32; over several tiles by a running maximum and sum.
        """
        single = len(self.head.tiling) == 1
        results = [torch.empty(0)] * len(inputs)
        tops, sums, scores = [], [], []
        for item in inputs:
            count, device = len(item.targets), item.hidden.device
            tops.append(torch.full((count,), float("-inf"), device=device))
            sums.append(torch.zeros(count, device=device))
            scores.append(torch.zeros(count, device=device))
        for tile, weight in self.tiles(self.head):
            rows = self.head.tiling.slice(tile)
            for i, item in enumerate(inputs):
                for part in self._parts(len(item.targets)):
                    z = self._scaled(self._raw(item.hidden[part], weight, rows)).float()
                    local = item.targets[part] - rows.start
                    if single:
                        z = z.log_softmax(-1)
                    inside = (local >= 0) & (local < z.shape[1])
                    picked = z.gather(1, local.clamp(0, z.shape[1] - 1)[:, None])[:, 0]
                    scores[i][part] = torch.where(inside, picked, scores[i][part])
                    if single:
                        continue
                    top = torch.maximum(tops[i][part], z.amax(1))
                    grown = torch.exp(z - top[:, None]).sum(1)
                    sums[i][part] = sums[i][part] * torch.exp(tops[i][part] - top) + grown
                    tops[i][part] = top
        for i, item in enumerate(inputs):
            item.normalizer = torch.zeros_like(tops[i]) if single else tops[i] + sums[i].log()
            results[i] = scores[i] - item.normalizer
        return results

    def _raw_gradient(self, item: HeadInput, weight: Tensor, rows: slice, part: slice) -> Tensor:
        """dL / d(raw logits) of a tile, in their dtype."""
        assert item.normalizer is not None and item.coefficient is not None
        raw = self._raw(item.hidden[part], weight, rows)
        z = self._scaled(raw).float()
        coefficient = item.coefficient[part]
        local = item.targets[part] - rows.start
        inside = ((local >= 0) & (local < z.shape[1])).nonzero()[:, 0]
        if len(self.head.tiling) == 1:
            # torch's own kernel, for its rounding.
            out = torch.zeros_like(z)
            out[inside, local[inside]] = coefficient[inside]
            grad = torch.ops.aten._log_softmax_backward_data(out, z.log_softmax(1), 1, z.dtype)
        else:
            p = z.sub_(item.normalizer[part, None]).exp_()
            grad = p.mul_(-coefficient[:, None])
            grad[inside, local[inside]] += coefficient[inside]
        grad = grad.to(raw.dtype)
        if self.factor == 1.0 and self.cap is None:
            return grad
        with torch.enable_grad():
            leaf = raw.detach().requires_grad_()
            return torch.autograd.grad(self._scaled(leaf), leaf, grad)[0]

    @torch.no_grad()
    def backward(
        self, inputs: Sequence[HeadInput], step_tile: Callable[[int, Tensor, Tensor], None] | None
    ) -> list[Tensor]:
        """dL/dhidden of each micro-batch, in the hidden states' dtype; `step_tile(tile, weight,
        gradient)` is called for each tile, in the same sweep, where the head can be stepped by it.
        """
        single = len(self.head.tiling) == 1
        grads: list[Tensor | None] = [None] * len(inputs)
        for tile, weight in self.tiles(self.head, backwards=True):
            rows = self.head.tiling.slice(tile)
            total: Tensor | None = None
            for i, item in enumerate(inputs):
                for part in self._parts(len(item.targets)):
                    raw = self._raw_gradient(item, weight, rows, part)
                    back = raw @ weight.to(raw.dtype)
                    into = grads[i]
                    if single and part.stop - part.start == len(item.targets):
                        grads[i] = back
                    else:
                        if into is None:
                            into = grads[i] = torch.zeros(item.hidden.shape, device=back.device)
                        into[part] += back
                    if step_tile is not None:
                        own = raw.mT @ item.hidden[part].to(raw.dtype)
                        total = own if total is None else total + own
            if step_tile is not None and total is not None:
                step_tile(tile, weight, total)
        return [
            torch.zeros_like(item.hidden) if grad is None else grad.to(item.hidden.dtype)
            for item, grad in zip(inputs, grads, strict=True)
        ]

    @torch.no_grad()
    def head_gradient(self, item: HeadInput, tile: int, weight: Tensor) -> Tensor:
        """dL/dW of one tile of the head for one micro-batch."""
        rows, total = self.head.tiling.slice(tile), None
        for part in self._parts(len(item.targets)):
            raw = self._raw_gradient(item, weight, rows, part)
            own = raw.mT @ item.hidden[part].to(raw.dtype)
            total = own if total is None else total + own
        if total is None:
            return torch.zeros_like(weight)
        return total

    # Steps -----------------------------------------------------------------------------------

    def gradient_tiles(
        self, matrix: Matrix, inputs: Sequence[HeadInput],
        rows: Sequence[tuple[Tensor, Tensor | None]], *, skip: bool = False,
    ) -> Iterator[tuple[int, Tensor, Tensor]]:  # fmt: skip
        """(tile, weight, gradient) of `matrix`: the head's part from `inputs`, the embedding's from
        `rows`, (ids, gradient rows) of each micro-batch. Added up in the order of micro-batches.
        `skip` leaves out tiles whose gradient is all zeros: of an embedding, those without a token.
        """
        of_head, of_rows = matrix is self.head, matrix is self.embedding
        chosen = None
        if skip and not of_head:
            used = [ids for ids, grad in rows if grad is not None]
            places = (
                torch.cat(used).div(matrix.tiling.step, rounding_mode="floor") if used else None
            )
            chosen = [] if places is None else places.unique().tolist()
        for tile, weight in self.tiles(matrix, chosen=chosen):
            part = matrix.tiling.slice(tile)
            total: Tensor | None = None
            for i in range(max(len(inputs), len(rows))):
                own: Tensor | None = None
                if of_head:
                    own = self.head_gradient(inputs[i], tile, weight)
                if of_rows:
                    ids, grad = rows[i]
                    edges = torch.tensor([part.start, part.stop], device=ids.device)
                    low, high = torch.searchsorted(ids, edges).tolist()
                    if grad is not None and low < high:
                        own = torch.zeros_like(weight) if own is None else own.to(weight.dtype)
                        own[ids[low:high] - part.start] += grad[low:high]
                if own is not None:
                    total = own if total is None else total + own
            yield tile, weight, torch.zeros_like(weight) if total is None else total

    def update(
        self, matrix: Matrix, applier: Applier, tiles: TilesOf, measure: Measure,
        begun: TiledStep | None = None,
    ) -> None:  # fmt: skip
        """Step `matrix` by the gradients that `tiles(skip)` gives, as `gradient_tiles` does.
        `begun`: an APOLLO step whose gradients have been measured already.
        """
        if applier.rules[matrix.name].form is not None:
            step = applier.begin_tensor(matrix.name)
            for tile, weight, grad in tiles(False):
                self.step_tile(matrix, applier, measure, step, tile, weight, grad)
            return
        dtype = matrix.param.dtype
        step_of = begun or self.tiled_step(matrix, applier)
        if begun is None:
            for tile, _, grad in tiles(True):
                part = matrix.tiling.slice(tile)
                step_of.measure(part, measure(matrix.name, grad.to(dtype)))
        step_of.finish()
        for tile, weight, grad in tiles(step_of.keep == 1.0):
            piece = matrix.piece(tile)
            self.cache.settle(piece)
            # A norm is noted once.
            step_of.apply(matrix.tiling.slice(tile), weight, measure("", grad.to(dtype)))
            self.cache.write(piece)

    def tiled_step(self, matrix: Matrix, applier: Applier) -> TiledStep:
        group = applier.steps.group(matrix.param)
        return TiledStep(applier.optimizer, group, matrix.param, matrix.name)

    def step_tile(
        self, matrix: Matrix, applier: Applier, measure: Measure, step: int,
        tile: int, weight: Tensor, grad: Tensor,
    ) -> None:  # fmt: skip
        """One AdamW step of one tile, and its write-back."""
        grad = measure(matrix.name, grad)
        self.cache.settle(matrix.piece(tile))
        applier.tile(matrix.name, tile, weight, grad, step)
        self.cache.write(matrix.piece(tile))
