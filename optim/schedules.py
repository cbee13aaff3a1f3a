"""Learning-rate schedules as pure functions of the step: nothing to save, nothing to resume."""

import math


def lr_factor(
    step: int, total: int, *, kind: str, warmup: float, decay: float = 0.2, min_ratio: float = 0.0
) -> float:
    """Factor of the peak rate at optimizer step `step` (0-based) of `total`.

    `warmup` below 1 is a share of `total`, otherwise a number of steps; the first step of a warm-up
    of n has factor 1/(n+1), so no step is lost at rate 0. `linear` and `cosine` reach `min_ratio`
    at the last step, `wsd` (warm-up, stable, decay) stays flat until the last `decay` share and
    falls on a line.
    """
    num_warmup = round(warmup * total) if warmup < 1 else int(warmup)
    if step < num_warmup:
        return (step + 1) / (num_warmup + 1)
    if kind == "constant":
        return 1.0
    start = num_warmup if kind != "wsd" else max(num_warmup, total - round(decay * total))
    if step < start:
        return 1.0
    done = min(1.0, (step - start) / max(1, total - 1 - start))
    shape = 0.5 * (1 + math.cos(math.pi * done)) if kind == "cosine" else 1 - done
    return min_ratio + (1 - min_ratio) * shape
