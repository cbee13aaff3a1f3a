"""Who is asked: a model in this process, one behind an endpoint, or gold. A request that fails is
an answer with an error, beside the others, and never an exception.
"""

import asyncio
import json
import sqlite3
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from mnemic.models.memory.endpoint import Endpoint, EndpointError
from mnemic.models.memory.op_prompts import EXTRACT, GENERATE, UPDATE, Messages
from mnemic.train.errors import UserError

MAX_NEW_TOKENS = {EXTRACT: 2048, UPDATE: 2048, GENERATE: 512}
"""Of an endpoint. Ample, since a model that thinks pays for its thoughts from it."""


@dataclass(frozen=True)
class Ask:
    """One question to the teacher. `context`: what cleaning needs to judge the reply; `target`:
    the reply of gold, where that is the teacher.
    """

    key: str
    operation: str
    prompt: Messages
    context: dict[str, Any] = field(default_factory=dict)
    target: str | None = None


@dataclass(frozen=True)
class Answer:
    """`cut`: ran into the token limit; `error`: why there is no reply."""

    reply: str
    cut: bool = False
    error: str | None = None


@dataclass
class Spent:
    """Tokens as the teacher counts them; `calls` and `cached` of an endpoint only."""

    prompt_tokens: int = 0
    new_tokens: int = 0
    calls: int = 0
    cached: int = 0


class Teacher(Protocol):
    name: str
    source: str
    """`teacher` or `gold`."""
    batch: int
    """Questions that it answers at once; no more are lost by a kill."""

    def answer(self, operation: str, asks: Sequence[Ask]) -> list[Answer]: ...
    def room(self, operation: str, messages: Messages) -> int | None: ...
    def spent(self) -> Spent: ...


class GoldTeacher:
    name = source = "gold"
    batch = 256

    def answer(self, operation: str, asks: Sequence[Ask]) -> list[Answer]:
        return [Answer(ask.target or "") for ask in asks]

    def room(self, operation: str, messages: Messages) -> int | None:
        return None

    def spent(self) -> Spent:
        return Spent()


class ModelTeacher:
    """A chat model of a folder or the hub, greedy, in this process."""

    source = "teacher"

    def __init__(self, name: str, path: str, batch: int) -> None:
        from mnemic.models.load import LoadError
        from mnemic.models.memory.model_reader import load_reader
        from mnemic.models.memory.op_writer import ModelWriter

        try:
            model, tokenizer = load_reader(path)
        except (LoadError, ValueError) as error:
            raise UserError(f"--teacher: {error}") from error
        self.name, self.batch = name, batch
        self._writer = ModelWriter(model, tokenizer, batch_size=batch)
        self._spent = Spent()

    def answer(self, operation: str, asks: Sequence[Ask]) -> list[Answer]:
        fits = [(self._writer.room(operation, ask.prompt) or 0) >= 0 for ask in asks]
        chosen = [ask.prompt for ask, fit in zip(asks, fits, strict=True) if fit]
        replies = iter(self._writer.write(operation, chosen))
        answers = []
        for fit in fits:
            if not fit:
                answers.append(Answer("", error="the prompt is longer than the model's context"))
                continue
            reply = next(replies)
            self._spent.prompt_tokens += reply.prompt_tokens
            self._spent.new_tokens += reply.new_tokens
            answers.append(Answer(reply.text, reply.cut))
        return answers

    def room(self, operation: str, messages: Messages) -> int | None:
        return self._writer.room(operation, messages)

    def spent(self) -> Spent:
        return self._spent


class EndpointTeacher:
    """`concurrency` requests at once, at most `rate` new ones a minute (None: as many as come).
    `settings` are those of `Endpoint`.
    """

    source = "teacher"

    def __init__(
        self, url: str, model: str, *, concurrency: int, rate: float | None, **settings: Any
    ) -> None:
        self.name, self.batch = model, concurrency
        pace = _Pace(60.0 / rate if rate else 0.0)
        self._clients = {
            operation: _Client(
                url, model, pace, concurrency=concurrency, max_tokens=most, **settings
            )
            for operation, most in MAX_NEW_TOKENS.items()
        }

    def answer(self, operation: str, asks: Sequence[Ask]) -> list[Answer]:
        try:
            found = self._clients[operation].complete([ask.prompt for ask in asks])
        except (EndpointError, sqlite3.Error) as error:
            # Not of one request: no HTTP client, or a cache that cannot be written.
            raise UserError(f"--teacher: {error}") from None
        return [Answer(**json.loads(text)) for text in found]

    def room(self, operation: str, messages: Messages) -> int | None:
        return None

    def spent(self) -> Spent:
        clients = self._clients.values()
        return Spent(
            sum(c.prompt_tokens for c in clients), sum(c.completion_tokens for c in clients),
            sum(c.calls for c in clients), sum(c.cached for c in clients),
        )  # fmt: skip


class _Pace:
    """Turns that are `gap` seconds apart."""

    def __init__(self, gap: float) -> None:
        self._gap, self._next = gap, 0.0

    def wait(self) -> float:
        """Seconds until the caller's turn."""
        now = time.monotonic()
        turn = max(now, self._next)
        self._next = turn + self._gap
        return turn - now


class _Client(Endpoint):
    """Answers are the JSON of an `Answer`, so that the cache keeps `cut` as well. A request that
    fails is one with an `error`; it is not cached, and the others of its batch go on.
    """

    def __init__(self, url: str, model: str, pace: _Pace, **settings: Any) -> None:
        super().__init__(url, model, **settings)
        self._pace = pace

    async def _ask(self, http: Any, client: Any, body: bytes, job: Any) -> str:
        # Before its time limit begins to run. Repeats have pauses of their own.
        await asyncio.sleep(self._pace.wait())
        return await super()._ask(http, client, body, job)

    async def _worker(self, http: Any, client: Any, job: Any) -> None:
        while job.queue and not job.stop:
            item = job.queue.popleft()
            one = replace(job, queue=deque([item]))
            await super()._worker(http, client, one)
            if isinstance(one.error, EndpointError):
                job.answers[item[0]] = json.dumps({"reply": "", "error": str(one.error)})
            elif one.error is not None:
                job.error, job.stop = one.error, True

    def _read(self, response: Any) -> str:
        text = super()._read(response)
        reason = response.json()["choices"][0].get("finish_reason")
        return json.dumps({"reply": text, "cut": reason == "length"})


def endpoint_teacher(url: str, model: str, cache: Path, **settings: Any) -> EndpointTeacher:
    """Raises `UserError` where the address or the API key cannot be one."""
    try:
        return EndpointTeacher(url, model, cache=cache, **settings)
    except ValueError as error:
        raise UserError(f"--teacher: {error}") from None
