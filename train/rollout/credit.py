"""From rewards to advantages: who is praised for what. Pure functions on plain lists.

A group is the rollouts of one episode. Rollout i earned `episode[i]` as a whole and `turns[i][t]`
at turn t; the result has an advantage for each turn of each rollout. Rollouts may have different
numbers of turns.
"""

import math
from collections.abc import Sequence
from typing import Literal

Credit = Literal["trajectory", "pooled_turn", "turn", "mixed"]
_EPS = 1e-6
"""Added to standard deviations, as TRL and Mem-alpha do."""


def advantages(
    credit: Credit, episode: Sequence[float], turns: Sequence[Sequence[float]], *, scale: bool
) -> list[list[float]]:
    """Advantages of one group.

    `trajectory` (MemAgent, arXiv 2507.02259): a rollout's reward, the mean of its turn rewards
    included, relative to the group's mean; the same for all of its turns. `pooled_turn` (Mem-alpha,
    2509.25911): the reward of a turn is the episode's plus its own; mean and deviation are of all
    turns of the group, so longer rollouts weigh more in them. `turn`: the same rewards, relative to
    the same turn of the other rollouts. `mixed`: the episode's reward as in `trajectory`, the turn
    rewards as in `turn`, added. Where nothing differs, everything is 0.
    """
    if credit == "trajectory":
        means = [sum(t) / len(t) if t else 0.0 for t in turns]
        whole = _centred([e + m for e, m in zip(episode, means, strict=True)], scale)
        return [[a] * len(t) for a, t in zip(whole, turns, strict=True)]
    if credit == "mixed":
        whole = _centred(list(episode), scale)
        own = _by_turn(turns, scale)
        return [[a + b for b in row] for a, row in zip(whole, own, strict=True)]
    both = [[e + r for r in row] for e, row in zip(episode, turns, strict=True)]
    if credit == "turn":
        return _by_turn(both, scale)
    pooled = iter(_centred([r for row in both for r in row], scale))
    return [[next(pooled) for _ in row] for row in both]


def _by_turn(rewards: Sequence[Sequence[float]], scale: bool) -> list[list[float]]:
    found: list[list[float]] = [[] for _ in rewards]
    for t in range(max((len(row) for row in rewards), default=0)):
        here = [i for i, row in enumerate(rewards) if len(row) > t]
        for i, value in zip(here, _centred([rewards[i][t] for i in here], scale), strict=True):
            found[i].append(value)
    return found


def _centred(values: Sequence[float], scale: bool) -> list[float]:
    """Minus the mean, by the sample deviation if `scale` (torch's, as TRL has it)."""
    if not values:
        return []
    mean = math.fsum(values) / len(values)
    left = [v - mean for v in values]
    if max(map(abs, left)) < 1e-12:
        return [0.0] * len(values)
    if not scale:
        return left
    deviation = math.sqrt(math.fsum(d * d for d in left) / max(1, len(left) - 1))
    return [d / (deviation + _EPS) for d in left]
