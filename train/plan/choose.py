"""The quickest way to run a recipe within a budget of memory, of what keeps its result first.

Candidates (`levers.py`) are taken in the order of what they change and of the least that a step
could take (`pace.py`). One that is taken is counted as `mnemic plan` counts it, gets the time that
its traffic asks for, and waits again for its turn: the first that comes back is the choice, and
nothing that comes after it had to be counted. What cannot fit by its weights and states alone, or
where the last of its streamed group does not fit, is passed over uncounted.
"""

import heapq
import itertools
import time
from dataclasses import dataclass, field
from typing import Any

from mnemic.train.callbacks.console import size
from mnemic.train.errors import RecipeError, UserError
from mnemic.train.plan.counter import Counter
from mnemic.train.plan.levers import Candidate, Grade, as_arguments, candidates, grade, inexact
from mnemic.train.plan.sizes import quiet
from mnemic.train.preflight import check_environment
from mnemic.train.recipe.recipe import Recipe
from mnemic.train.recipe.training import StreamedUpdate

_MORE = 5.0
"""Seconds that a table's alternatives may take once the choice is known."""
_SAVING = 4
"""Those that are counted for the sentence that nothing fits."""


@dataclass
class Option:
    """A candidate with its figures. `least`: `need` is what it takes at the least, uncounted.
    `reason`: why it is not taken; empty where it fits.
    """

    candidate: Candidate
    recipe: Recipe
    grade: Grade
    seconds: float
    need: int = 0
    least: bool = False
    reason: str = ""

    @property
    def overrides(self) -> str:
        return as_arguments(self.candidate.overrides)


@dataclass
class Choice:
    """`given`: the recipe as it is; `options`: what else fits, best first; `rejected`: the quickest
    of those that do not; `refused`: sentences of validation, each once.
    """

    name: str
    budget: int
    place: str
    given: Option
    chosen: Option
    options: list[Option] = field(default_factory=list)
    rejected: list[Option] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    counted: int = 0
    seconds: float = 0.0


def choose(recipe: Recipe, *, more: bool = True) -> Choice:
    """The choice for `recipe.loop.memory_budget`; `more`: with alternatives. `UserError` where
    nothing fits, with the least that would.
    """
    began = time.perf_counter()
    counter = Counter(recipe)
    choice = _Search(counter).run(more)
    choice.notes, choice.counted = counter.notes, counter.counted
    choice.seconds = time.perf_counter() - began
    return choice


class _Search:
    """Options wait by what they change and by their seconds; those of one group share `dead`, the
    reason why none of them fits.
    """

    def __init__(self, counter: Counter) -> None:
        self.counter, self.given = counter, counter.given
        self.width = counter.shapes(self.given).largest.width
        self.levels = inexact(self.given)
        self.waiting: list[tuple[Any, ...]] = []
        self.refused: dict[str, None] = {}
        self.last: dict[str, Option] = {}
        self.dead: set[str] = set()
        self.rejected: dict[str, Option] = {}
        self.numbers = itertools.count()

    def run(self, more: bool) -> Choice:
        found: list[Option] = []
        level, limit = 0, 0.0
        own: Option | None = None
        while level < len(self.levels) or self.waiting:
            # Those of the next level change one thing more, at the least.
            if not self.waiting or (level < len(self.levels) and self.waiting[0][0][0] >= level):
                if level < len(self.levels) and not found:
                    self._push_level(level)
                    level += 1
                    continue
                break
            if found and (len(found) == 4 or time.perf_counter() > limit):
                break
            option, counted = heapq.heappop(self.waiting)[-2:]
            own = own or option  # the recipe as it is changes nothing, and is not slower
            if counted:
                if all(_kind(option) != _kind(other) for other in found):
                    found.append(option)
                if not more:
                    break
                limit = limit or time.perf_counter() + _MORE
            elif not self._dead(option) and self._count(option):
                self._push(option, True)
        assert own is not None
        if not found:
            raise UserError(self._sentence())
        rejected = sorted(self.rejected.values(), key=lambda o: (o.grade.order, o.seconds))
        return Choice(
            self.given.name, self.counter.budget, self.counter.place, own, found[0], found[1:],
            [o for o in rejected if o is not own], list(self.refused),
        )  # fmt: skip

    def _push_level(self, level: int) -> None:
        for extra in self.levels[level]:
            for candidate in candidates(self.given, self.width, extra):
                try:
                    recipe = candidate.recipe(self.given)
                except RecipeError as error:
                    self.refused.setdefault(error.problems[0])
                    continue
                seconds = self.counter.seconds(recipe, None)
                option = Option(candidate, recipe, grade(self.given, recipe), seconds)
                # Of a group the last that validation takes is the one that needs least.
                self.last[candidate.group] = option
                self._push(option, False)

    def _push(self, option: Option, counted: bool) -> None:
        key = option.grade.order, option.seconds, len(option.candidate.overrides)
        heapq.heappush(self.waiting, (*key, next(self.numbers), option, counted))

    def _dead(self, option: Option) -> bool:
        """Whether the option cannot fit by what it takes at the least, or none of its group can."""
        if option.candidate.group in self.dead:
            return True
        floor = self.counter.floor(option.recipe)
        if floor > self.counter.budget:
            option.need, option.least = floor, True
            self._reject(option, "over the budget")
        return option.least

    def _count(self, option: Option) -> bool:
        """Give it figures; whether it fits."""
        if not option.need and not option.reason:
            self._fill(option)
        if not option.reason:
            return True
        self._reject(option, option.reason)
        group = option.candidate.group
        last = self.last[group]
        if not isinstance(last.recipe.update, StreamedUpdate):
            return False  # a step of a model in memory is slow to count
        if not last.need and not last.reason:
            self._fill(last)
        if last.need > self.counter.budget and not last.least:
            self.dead.add(group)
        return False

    def _fill(self, option: Option) -> None:
        try:
            with quiet():
                check_environment(option.recipe)
            option.need, way = self.counter.need(option.recipe)
        except UserError as error:
            option.reason = str(error)
            return
        option.seconds = self.counter.seconds(option.recipe, way)
        over = option.need > self.counter.budget
        option.reason = "over the budget" if over else self.counter.lacking(way)

    def _reject(self, option: Option, reason: str) -> None:
        option.reason = reason
        self.rejected.setdefault(option.candidate.group, option)

    def _sentence(self) -> str:
        """That nothing fits, and the least that would: of exact choices, and of all."""
        exact = self._least([o for o in self.last.values() if not o.grade.order[0]])
        least = self._least(list(self.last.values())) or exact
        budget, given = self.counter.budget, self.given.loop.memory_budget
        text = (
            f"loop.memory_budget={given}: no choice of update, offload, tokens, batches and "
            f"recomputation is predicted to fit into {size(budget)} of {self.counter.place}"
        )
        if least is None:
            return f"{text}; take a smaller model, or shorter rows"
        text += f"; the least is {size(least.need)}"
        if least.grade.word != "exact":
            text += f" ({least.grade.word})"
        text += f" with {least.overrides or 'the recipe as it is'}"
        if exact is not None and exact is not least:
            text += f", and {size(exact.need)} with the same result as the recipe's"
        if not self.counter.on_device:
            text += f"; {size(self.counter.base)} of it are the imports"
        wanted = -(-least.need >> 20)
        return f"{text}; give {wanted}MiB or more, or take a smaller model or shorter rows"

    def _least(self, options: list[Option]) -> Option | None:
        """Of those with figures, and of the most saving ones, which get theirs here."""
        saving = [o for o in options if o.recipe.offload.kind == "ssd"] or options
        saving.sort(key=lambda o: -o.grade.order[0])
        for option in saving[:_SAVING]:
            if not option.need or option.least:
                option.reason, option.least = "", False
                self._fill(option)
        known = [o for o in options if o.need and not o.least]
        return min(known, key=lambda o: o.need, default=None)


def _kind(option: Option) -> dict[str, Any]:
    """An option's overrides without sizes, which make no alternative of their own."""
    return {k: v for k, v in option.candidate.overrides.items() if not k.endswith("batch_size")}
