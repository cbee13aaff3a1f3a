"""A client for any OpenAI-compatible chat endpoint: many requests at once, repeated where it helps,
each answer paid for once.

Answers are committed to a cache on disk as they arrive, keyed by all that decides them, so that an
interrupted evaluation goes on where it stopped. Teacher data and readers (endpoint_reader.py) share
it.
"""

import asyncio
import hashlib
import importlib
import json
import os
import random
import sqlite3
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

Messages = list[dict[str, str]]

MAX_BACKOFF = 30.0
MAX_RETRY_AFTER = 300.0
"""Seconds. A server that asks for a longer pause gets none: the run stops and says so."""


class EndpointError(RuntimeError):
    """No answer to be had; the text names the URL and the status or cause, never the key."""


class Unanswered(Exception):
    """One failed request that is worth another; `wait`: the seconds the server asked for."""

    def __init__(self, why: str, wait: float = 0.0) -> None:
        super().__init__(why)
        self.wait = wait


@dataclass(slots=True)
class _Job:
    """What the workers of one `complete` share."""

    queue: deque[tuple[str, bytes]]
    cache: sqlite3.Connection | None
    answers: dict[str, str] = field(default_factory=dict)
    error: Exception | None = None
    stop: bool = False


class Endpoint:
    """`base_url` may be a host, end in /v1, or be the whole path. The key is `api_key`, else
    OPENAI_API_KEY, else none is sent. `timeout` (s) bounds one request, `retries` its repeats,
    `backoff` (s) is the first pause before one and doubles. `cache`: an SQLite file. `extra`: more
    fields of the request.

    Counters: `calls` are requests sent, `retried` those of them that were repeats, `cached` answers
    that needed none; tokens are those the server reports.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str | None = None,
        concurrency: int = 8,
        retries: int = 5,
        timeout: float = 60.0,
        backoff: float = 0.5,
        cache: Path | None = None,
        max_tokens: int = 64,
        temperature: float = 0.0,
        extra: dict[str, Any] | None = None,
    ) -> None:
        if concurrency < 1 or retries < 0 or timeout <= 0:
            raise ValueError("concurrency is at least 1, retries at least 0, timeout above 0")
        self.url, self.shown_url = _chat_url(base_url)
        self.model, self.cache = model, cache
        self.concurrency, self.retries = concurrency, retries
        self.timeout, self.backoff = timeout, backoff
        self.parameters = {**(extra or {}), "max_tokens": max_tokens, "temperature": temperature}
        self._key = (api_key or os.environ.get("OPENAI_API_KEY") or "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise ValueError("the API key holds characters that no HTTP header takes")
        # Its own: jitter must not move the random numbers of a training run.
        self._random = random.Random()
        self.calls = self.cached = self.retried = 0
        self.prompt_tokens = self.completion_tokens = 0

    def complete(self, conversations: Sequence[Messages]) -> list[str]:
        """The answer to each, in their order; an answer without text is "".

        At temperature 0 equal conversations are asked once; else each gets its own sample, the same
        ones from the cache in a second call. `EndpointError` where one cannot be answered: what
        was under way by then is waited for and cached, nothing else is begun.
        """
        keys, todo = self._plan(conversations)
        with self._open_cache() as cache:
            answers = _read(cache, todo) if cache else {}
            queue = deque((key, todo[key]) for key in todo if key not in answers)
            self.cached += len(keys) - len(queue)
            if queue:
                job = _Job(queue, cache, answers)
                _run(self._work_off(job), job)
                if job.error is not None:
                    raise job.error
        return [answers[key] for key in keys]

    def _plan(self, conversations: Sequence[Messages]) -> tuple[list[str], dict[str, bytes]]:
        """A key for each conversation, and the body of the request behind each different key."""
        sampled = self.parameters["temperature"] > 0
        seen: dict[bytes, int] = {}
        keys: list[str] = []
        todo: dict[str, bytes] = {}
        for messages in conversations:
            request = {"model": self.model, "messages": messages, **self.parameters}
            body = json.dumps(request, sort_keys=True).encode()
            number = seen.get(body, 0)
            seen[body] = number + sampled
            key = hashlib.sha256(body + (f"#{number}".encode() if number else b"")).hexdigest()
            keys.append(key)
            todo[key] = body
        return keys, todo

    async def _work_off(self, job: _Job) -> None:
        http = _http()
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        workers = min(self.concurrency, len(job.queue))
        limits = http.Limits(max_connections=workers, max_keepalive_connections=workers)
        async with http.AsyncClient(headers=headers, timeout=self.timeout, limits=limits) as client:
            await asyncio.gather(*(self._worker(http, client, job) for _ in range(workers)))

    async def _worker(self, http: Any, client: Any, job: _Job) -> None:
        while job.queue and not job.stop:
            key, body = job.queue.popleft()
            try:
                text = await self._ask(http, client, body, job)
                if job.cache is not None:
                    _write(job.cache, key, text)
            except Exception as error:
                # The others finish what they have paid for, then the first error is raised.
                job.error, job.stop = job.error or error, True
                return
            job.answers[key] = text

    async def _ask(self, http: Any, client: Any, body: bytes, job: _Job) -> str:
        attempt = 0
        while True:
            try:
                self.calls += 1
                self.retried += attempt > 0
                # httpx bounds each read; a server that drips would never run into that.
                request = client.post(self.url, content=body)
                return self._read(await asyncio.wait_for(request, self.timeout))
            except (http.RequestError, asyncio.TimeoutError, Unanswered) as error:
                why, asked = self._why(error), getattr(error, "wait", 0.0)
            if attempt == self.retries or job.stop or asked > MAX_RETRY_AFTER:
                pause = f"; asks to wait {asked:.0f} s" if asked > MAX_RETRY_AFTER else ""
                raise EndpointError(
                    f"{self.shown_url}: {why}{pause}; gave up after {attempt + 1} requests"
                )
            wait = min(self.backoff * 2**attempt, MAX_BACKOFF) * self._random.uniform(0.5, 1.5)
            await asyncio.sleep(max(wait, asked))
            attempt += 1

    def _read(self, response: Any) -> str:
        """The text of an answer; `Unanswered` to ask again, `EndpointError` to give up."""
        status = response.status_code
        if status in (408, 429) or status >= 500:
            wait = _retry_after(response.headers.get("retry-after"))
            raise Unanswered(f"status {status}: {self._quote(response.text)}", wait)
        if status != 200:
            raise EndpointError(
                f"{self.shown_url}: status {status} for model {self.model!r}: "
                f"{self._quote(response.text)}"
            )
        try:
            answer = response.json()
            text = answer["choices"][0]["message"]["content"]
            if not isinstance(text, str | None):
                raise TypeError
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            quote = self._quote(response.text)
            raise Unanswered(f"status 200 without a chat completion: {quote}") from None
        usage = answer.get("usage")
        for name in ("prompt_tokens", "completion_tokens"):
            count = usage.get(name) if isinstance(usage, dict) else None
            if isinstance(count, int):
                setattr(self, name, getattr(self, name) + count)
        # A lone surrogate is JSON, and neither UTF-8 nor SQLite.
        return (text or "").encode("utf-8", "replace").decode()

    def _why(self, error: Exception) -> str:
        if isinstance(error, Unanswered):
            return str(error)
        if isinstance(error, asyncio.TimeoutError) or "Timeout" in type(error).__name__:
            return f"no answer in {self.timeout:g} s"
        return self._quote(f"{type(error).__name__}: {error}")

    def _quote(self, text: str) -> str:
        """The beginning of what a server said; some repeat the key they were sent."""
        if self._key:
            text = text.replace(self._key, "***")
        return " ".join(text[:300].split())

    @contextmanager
    def _open_cache(self) -> Iterator[sqlite3.Connection | None]:
        if self.cache is None:
            yield None
            return
        try:
            # A worker thread may write: one thread at a time does.
            connection = sqlite3.connect(self.cache, timeout=60, check_same_thread=False)
            with connection:
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, text TEXT)"
                )
        except sqlite3.DatabaseError as error:
            raise EndpointError(f"{self.cache}: cannot be the answer cache: {error}") from error
        try:
            yield connection
        finally:
            connection.close()


def _read(cache: sqlite3.Connection, keys: dict[str, bytes]) -> dict[str, str]:
    found: dict[str, str] = {}
    for key in keys:
        row = cache.execute("SELECT text FROM answers WHERE key = ?", (key,)).fetchone()
        if row is not None:
            found[key] = row[0]
    return found


def _write(cache: sqlite3.Connection, key: str, text: str) -> None:
    with cache:
        cache.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, text))


def _run(work: Any, job: _Job) -> None:
    """Wait for a coroutine, in a thread of its own where a loop runs in this one (notebooks)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
        return
    with ThreadPoolExecutor(1) as pool:
        try:
            pool.submit(asyncio.run, work).result()
        except BaseException:
            job.stop = True  # Ctrl-C: leave after the requests under way
            raise


def _http() -> Any:
    """httpx2 or httpx: the same interface, and huggingface_hub brings one of them."""
    for name in ("httpx2", "httpx"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise EndpointError("an endpoint needs httpx: pip install httpx")


def _chat_url(base: str) -> tuple[str, str]:
    """(the URL to post to, the same without password and query, for messages)."""
    parts = urlsplit(base.strip())
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("base_url is http(s)://HOST[:PORT][/v1]")
    path = parts.path.rstrip("/")
    if not path.endswith("/chat/completions"):
        path = f"{path or '/v1'}/chat/completions"
    host = parts.netloc.rpartition("@")[2]
    return (
        urlunsplit((parts.scheme, parts.netloc, path, parts.query, "")),
        urlunsplit((parts.scheme, host, path, "", "")),
    )


def _retry_after(value: str | None) -> float:
    """Seconds to wait, from a number or a date; 0 where the header is missing or unreadable."""
    if value is None:
        return 0.0
    try:
        seconds = float(value)
    except ValueError:
        try:
            when = parsedate_to_datetime(value)
        except ValueError:
            return 0.0
        if when.tzinfo is None:
            when = when.replace(tzinfo=timezone.utc)
        seconds = (when - datetime.now(timezone.utc)).total_seconds()
    return seconds if seconds > 0 else 0.0
