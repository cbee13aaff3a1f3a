"""Random projections of a gradient, from d = min(m, n) to `rank` dimensions.

A projection is a function of (key, d, rank): nothing of it is stored, and any slice of its rows can
be had alone, so a shard of the gradient projects its part and the parts add up. Both kinds keep
squared norms in expectation, E ||P g||^2 = ||g||^2:

- gaussian: entries N(0, 1/rank) (APOLLO, arXiv 2412.05270, Alg. 1): 2 rank FLOP for each element.
- sparse: row i goes with a random sign to bucket (i + shift) mod rank, `shift` drawn anew for each
  run of `rank` rows; so two rows of one run never meet and two of different runs meet with
  probability 1/rank. That is a count sketch (Charikar et al., 2002) whose variance is never higher,
  and it reads the gradient once, in slices, whatever the rank. `entries` of them, averaged, are
  OSNAP (Nelson and Nguyen, 2013).

`side` names the axis of G that is projected: "right" its columns (m >= n, R = G P: m x rank),
"left" its rows (m < n, R = P^T G: rank x n).
"""

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from mnemic.optim.random import normals, signs, words

Kind = Literal["gaussian", "sparse"]

# With more runs of `rank` rows, or less rank, the sketch is a small dense matrix: one product beats
# slices.
_MAX_RUNS, _MIN_RANK = 64, 4


class Projection:
    """Rows `start ... start + count - 1` of the d x rank matrix P of one tensor and interval."""

    def __init__(
        self, kind: Kind, key: int, rank: int, start: int, count: int,
        device: torch.device | str, dtype: torch.dtype, entries: int = 1,
    ) -> None:  # fmt: skip
        self.kind, self.key, self.rank, self.entries = kind, key, rank, entries
        self.start, self.count, self.device, self.dtype = start, count, device, dtype
        runs = -(-(start + count) // rank)
        self._dense: Tensor | None = None
        self._sketches: list[tuple[Tensor, list[int]]] = []
        if kind == "gaussian":
            flat = normals(key, start * rank, count * rank, device)
            self._dense = flat.view(count, rank).mul_(rank**-0.5).to(dtype)
            return
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        for entry in range(entries):
            sign = signs(key + 2 * entry, start, count, device).mul_(entries**-0.5).to(exact)
            shifts = words(key + 2 * entry + 1, 0, runs).remainder_(rank).tolist()
            self._sketches.append((sign, shifts))
        if runs > _MAX_RUNS or rank < _MIN_RANK:
            self._dense = self._as_dense().to(dtype)
            self._sketches = []

    @property
    def numel(self) -> int:
        """Numbers held."""
        if self._dense is not None:
            return self._dense.numel()
        return sum(sign.numel() + len(shifts) for sign, shifts in self._sketches)

    def matrix(self) -> Tensor:
        """P itself, (count, rank)."""
        return self._dense if self._dense is not None else self._as_dense().to(self.dtype)

    def _as_dense(self) -> Tensor:
        first = self._sketches[0][0]
        dense = first.new_zeros(self.count, self.rank)
        rows = torch.arange(self.count, device=self.device)
        for sign, shifts in self._sketches:
            runs = (rows + self.start) // self.rank
            shift = torch.tensor(shifts, device=self.device)[runs]
            dense[rows, (rows + self.start + shift) % self.rank] += sign
        return dense

    def __call__(self, grad: Tensor, side: str) -> Tensor:
        """R of `grad` (..., m, n), in fp32 (fp64 for fp64); leading dimensions share P."""
        exact = torch.float64 if grad.dtype == torch.float64 else torch.float32
        if self._dense is not None:
            low = grad @ self._dense if side == "right" else self._dense.mT @ grad
            return low.to(exact)
        shape = [*grad.shape]
        shape[-1 if side == "right" else -2] = self.rank
        # The first run fills every bucket, unless this is a shard that lacks some of its rows.
        filled = self.start == 0 and self.count >= self.rank
        low = torch.empty(shape, dtype=exact, device=grad.device)
        if not filled:
            low.zero_()
        for first, rows, buckets, sign in self._slices():
            if side == "right":
                part, into = grad[..., rows].to(exact), low[..., buckets]
            else:
                part, into, sign = grad[..., rows, :].to(exact), low[..., buckets, :], sign[:, None]
            if first and filled:
                torch.mul(part, sign, out=into)
            else:
                into.addcmul_(part, sign)
        return low

    def _slices(self) -> Iterator[tuple[bool, slice, slice, Tensor]]:
        """Runs of local rows, the buckets they go to in order, and their signs; and whether it is
        the first run of the first sketch.
        """
        stop = self.start + self.count
        for number, (sign, shifts) in enumerate(self._sketches):
            for run, shift in enumerate(shifts):
                # Rows of the run before and after its buckets wrap around.
                base = run * self.rank
                turn = base + self.rank - shift
                for low, high, bucket in ((base, turn, shift), (turn, base + self.rank, 0)):
                    a, b = max(low, self.start), min(high, stop)
                    if a < b:
                        rows = slice(a - self.start, b - self.start)
                        offset = bucket + a - low
                        buckets = slice(offset, offset + b - a)
                        yield number == run == 0, rows, buckets, sign[rows]
