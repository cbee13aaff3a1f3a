"""The paired bootstrap of a difference between two systems over the same items."""

from collections.abc import Callable, Sequence
from typing import Any

RESAMPLES = 10_000


def difference(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]],
    figure: Callable[[Any], Any], resamples: int = RESAMPLES,
) -> dict[str, float] | None:  # fmt: skip
    """{"mean", "low", "high"}: `figure` of ours minus theirs with its 95 % paired bootstrap
    interval: the same items (rows of numbers) are drawn of both. `figure` takes column sums, (...,
    columns), the last one the number of items. None for fewer than 2 items.

    Items of one conversation are drawn as if they were independent, so the interval is about these
    conversations, not about others.
    """
    import numpy as np

    if len(ours) < 2:
        return None
    tables = [np.array([[*row, 1.0] for row in side], dtype=np.float64) for side in (ours, theirs)]
    draw, size, found = np.random.default_rng(0), len(ours), []
    block = max(1, 2_000_000 // size)
    for start in range(0, resamples, block):
        picks = draw.integers(size, size=(min(block, resamples - start), size))
        # Weights, not gathers: a resample is a vector of counts.
        counts = np.zeros((len(picks), size))
        np.add.at(counts, (np.arange(len(picks))[:, None], picks), 1.0)
        found.append(figure(counts @ tables[0]) - figure(counts @ tables[1]))
    low, high = np.percentile(np.concatenate(found), [2.5, 97.5])
    whole = figure(tables[0].sum(0)) - figure(tables[1].sum(0))
    return {"mean": float(whole), "low": float(low), "high": float(high)}


def mean_of(sums: Any) -> Any:
    """A figure for `difference`: the mean of the only column."""
    return sums[..., 0] / sums[..., -1]


def f1_of(sums: Any) -> Any:
    """A figure for `difference` over (matched, judged, gold) by chunk."""
    import numpy as np

    return 2 * sums[..., 0] / np.maximum(sums[..., 1] + sums[..., 2], 1)
