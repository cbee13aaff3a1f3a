"""The data pipeline: stages that hand on items and can be put back, exactly, to any point they
stood at.

Each stage is an endless iterator with `state_dict` / `load_state_dict`; a state is plain numbers
and lists. After the last item of a pass comes `EPOCH_END`. Every rank reads the whole stream and
takes its share of each global batch, so the order of the data depends on neither the number of
ranks nor the micro-batch size, and a checkpoint resumes on any number of ranks.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Generic, TypeVar

from mnemic.train.data.rows import BadRow, BadRows, Row, Source
from mnemic.train.errors import UserError

State = dict[str, Any]
T = TypeVar("T")
U = TypeVar("U")


class _EpochEnd:
    """Marks the end of one pass over the data."""


EPOCH_END = _EpochEnd()


class Stage(Generic[T]):
    """Base of the stages."""

    def __next__(self) -> "T | _EpochEnd":
        raise StopIteration

    def __iter__(self) -> "Stage[T]":
        return self

    def state_dict(self) -> State:
        return {}

    def load_state_dict(self, state: State) -> None:
        del state


class Reader(Stage[Row]):
    """Rows of a source, over and over. `every_nth` with `held` splits rows: n-th rows are
    held out.
    """

    def __init__(
        self, source: Source, bad: BadRows, *, nth: int | None = None, held: bool = False
    ) -> None:
        self.source, self.bad, self.nth, self.held = source, bad, nth, held
        self.epoch = self.index = self.yielded = 0
        self.position: list[int] | None = None
        self._rows: Iterator[Row | BadRow] | None = None

    def __next__(self) -> Row | _EpochEnd:
        if self._rows is None:
            self._rows = self.source.read(self.position)
        for row in self._rows:
            self.position = row.after
            self.index += 1
            if self.epoch:
                row = replace(row, again=True)
            if self.nth and (self.index % self.nth == 0) != self.held:
                continue
            if isinstance(row, BadRow):
                self.bad.add(row)
                continue
            self.yielded += 1
            return row
        if not self.yielded:
            raise UserError(f"{self.bad.key}: no usable row ({self.bad.count} bad)")
        self.epoch += 1
        self.index = self.yielded = 0
        self.position = self._rows = None
        return EPOCH_END

    def state_dict(self) -> State:
        return {
            "epoch": self.epoch,
            "index": self.index,
            "yielded": self.yielded,
            "position": self.position,
            "bad": self.bad.count,
            "truncated": self.bad.truncated,
        }

    def load_state_dict(self, state: State) -> None:
        self.epoch, self.index = state["epoch"], state["index"]
        self.yielded, self.position = state["yielded"], state["position"]
        self.bad.count, self.bad.truncated = state["bad"], state["truncated"]
        self._rows = None


class Map(Stage[U], Generic[T, U]):
    """`convert` each item; None drops it (the converter has reported why)."""

    def __init__(self, upstream: Stage[T], convert: Callable[[T], U | None]) -> None:
        self.upstream, self.convert = upstream, convert
        self.kept = 0

    def __next__(self) -> U | _EpochEnd:
        while True:
            item = next(self.upstream)
            if isinstance(item, _EpochEnd):
                if not self.kept:
                    raise UserError("data: no row of a whole pass could be used (see the warnings)")
                self.kept = 0
                return item
            converted = self.convert(item)
            if converted is not None:
                self.kept += 1
                return converted

    def state_dict(self) -> State:
        return {"upstream": self.upstream.state_dict(), "kept": self.kept}

    def load_state_dict(self, state: State) -> None:
        self.upstream.load_state_dict(state["upstream"])
        self.kept = state["kept"]


class Concat(Stage[list[int]]):
    """Joins token lists and cuts them into rows of `length`; what is left over begins the next
    pass.

    With `flush`, a pass ends with its remainder as a shorter row instead (evaluation sees every
    token).
    """

    def __init__(self, upstream: Stage[list[int]], length: int, *, flush: bool = False) -> None:
        self.upstream, self.length, self.flush = upstream, length, flush
        self.carry: list[int] = []
        self._ended = False

    def __next__(self) -> list[int] | _EpochEnd:
        if self._ended:
            self._ended = False
            return EPOCH_END
        while len(self.carry) < self.length:
            item = next(self.upstream)
            if isinstance(item, _EpochEnd):
                if self.flush and len(self.carry) > 1:
                    row, self.carry, self._ended = self.carry, [], True
                    return row
                return item
            self.carry.extend(item)
        row, self.carry = self.carry[: self.length], self.carry[self.length :]
        return row

    def state_dict(self) -> State:
        return {
            "upstream": self.upstream.state_dict(),
            "carry": list(self.carry),
            "ended": self._ended,
        }

    def load_state_dict(self, state: State) -> None:
        self.upstream.load_state_dict(state["upstream"])
        self.carry, self._ended = list(state["carry"]), state["ended"]


class Window(Stage[U], Generic[T, U]):
    """Collects up to `size` items (never across a pass), rearranges them, hands them on.

    `rearrange(items, number)` is a pure function of the window and its number: the state is the
    upstream's at the window's start and how many items were handed on, and putting it back reads
    one window again.
    """

    def __init__(
        self, upstream: Stage[T], size: int, rearrange: Callable[[list[T], int], list[U]]
    ) -> None:
        self.upstream, self.size, self.rearrange = upstream, size, rearrange
        self.number = 0
        self._start: State | None = None
        self._items: list[U | _EpochEnd] = []
        self._taken = 0

    def _fill(self) -> None:
        self._start = self.upstream.state_dict()
        items: list[T] = []
        tail: list[_EpochEnd] = []
        while len(items) < self.size and not tail:
            item = next(self.upstream)
            if isinstance(item, _EpochEnd):
                tail = [item]
            else:
                items.append(item)
        self._items = [*self.rearrange(items, self.number), *tail]
        self._taken = 0
        self.number += 1

    def __next__(self) -> U | _EpochEnd:
        while self._taken == len(self._items):
            self._fill()
        self._taken += 1
        return self._items[self._taken - 1]

    def state_dict(self) -> State:
        if self._start is None:
            return {"start": self.upstream.state_dict(), "taken": 0, "number": self.number}
        return {"start": self._start, "taken": self._taken, "number": self.number - 1}

    def load_state_dict(self, state: State) -> None:
        self.upstream.load_state_dict(state["start"])
        self.number, self._items, self._start, self._taken = state["number"], [], None, 0
        if state["taken"]:
            self._fill()
            self._taken = state["taken"]


def shuffled(upstream: Stage[T], window: int, seed: int) -> Window[T, T]:
    """Permutes windows; the permutation is a function of (seed, window number)."""

    def permute(items: list[T], number: int) -> list[T]:
        items = list(items)
        random.Random(f"{seed}/{number}").shuffle(items)
        return items

    return Window(upstream, window, permute)


def one_pass(stage: Stage[T], limit: int | None = None) -> list[T]:
    """All items up to the end of the pass, at most `limit`."""
    items: list[T] = []
    for item in stage:
        if isinstance(item, _EpochEnd) or len(items) == limit:
            break
        items.append(item)
    return items


def count_pass(stage: Stage[Any]) -> int:
    """Number of items in one pass."""
    count = 0
    for item in stage:
        if isinstance(item, _EpochEnd):
            break
        count += 1
    return count


def take(stage: Stage[T], count: int) -> list[T]:
    """The next `count` items, across ends of passes."""
    items: list[T] = []
    while len(items) < count:
        item = next(stage)
        if not isinstance(item, _EpochEnd):
            items.append(item)
    return items
