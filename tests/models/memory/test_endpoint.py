"""The endpoint client against a real server that answers, fails, stalls and talks nonsense."""

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mnemic.models.memory import Ask, Endpoint, EndpointError, EndpointReader, make_store
from mnemic.models.memory.endpoint import _chat_url, _retry_after

Reply = tuple[int, dict[str, str], str]


def says(text: str | None) -> Reply:
    usage = {"prompt_tokens": 7, "completion_tokens": 2}
    body = {"choices": [{"message": {"role": "assistant", "content": text}}], "usage": usage}
    return 200, {}, json.dumps(body)


class Server:
    """`reply(body, number)` decides what the request of that number gets."""

    def __init__(self) -> None:
        self.reply: Callable[[dict[str, Any], int], Reply] = lambda body, number: says(
            body["messages"][-1]["content"].upper()
        )
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.times: list[float] = []
        self.busy = self.most = 0
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(server.requests)
                    server.requests.append(body)
                    server.headers.append(dict(self.headers.items()))
                    server.paths.append(self.path)
                    server.times.append(time.monotonic())
                    server.busy += 1
                    server.most = max(server.most, server.busy)
                try:
                    status, headers, text = server.reply(body, number)
                finally:
                    with lock:
                        server.busy -= 1
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                for byte in text.encode() if "X-Drip" in headers else [text.encode()]:
                    self.wfile.write(bytes([byte]) if isinstance(byte, int) else byte)
                    time.sleep(float(headers.get("X-Drip", 0)))

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # a client that gave up waiting

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = Server()
    yield server
    server.close()


def endpoint(server: Server, **settings: Any) -> Endpoint:
    return Endpoint(server.url, "m", **{"backoff": 0.001, "api_key": "sk-secret", **settings})


def talks(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}] for text in texts]


def test_answers_come_in_order_many_at_once(server: Server) -> None:
    def slow_first(body: dict[str, Any], number: int) -> Reply:
        text = body["messages"][-1]["content"]
        time.sleep(0.15 if text == "a0" else 0.03)
        return says(text.upper())

    server.reply = slow_first
    client = endpoint(server, concurrency=4, max_tokens=9, extra={"seed": 5})
    texts = [f"a{i}" for i in range(12)]
    assert client.complete(talks(*texts)) == [t.upper() for t in texts]
    assert 2 <= server.most <= 4
    assert (client.calls, client.cached, client.retried) == (12, 0, 0)
    assert (client.prompt_tokens, client.completion_tokens) == (84, 24)
    sent = server.requests[0]
    assert (sent["model"], sent["max_tokens"], sent["temperature"], sent["seed"]) == ("m", 9, 0, 5)
    assert server.headers[0]["Authorization"] == "Bearer sk-secret"
    assert server.paths[0] == "/v1/chat/completions"


@pytest.mark.parametrize(
    "bad",
    [
        (429, {}, "slow down"),
        (503, {}, "overloaded"),
        (200, {}, "<html>not JSON"),
        (200, {}, '{"choices": []}'),
        (200, {}, '{"choices": [{"message": {"content": 5}}]}'),
        (200, {}, "[" * 100_000),
        (200, {"Content-Encoding": "gzip"}, "not gzip"),
    ],
)
def test_what_may_pass_is_asked_again(server: Server, bad: Reply) -> None:
    server.reply = lambda body, number: bad if number < 2 else says("yes")
    client = endpoint(server)
    assert client.complete(talks("q")) == ["yes"]
    assert (client.calls, client.retried) == (3, 2)


@pytest.mark.parametrize("drip", [True, False])
def test_a_stalled_request_is_asked_again(server: Server, drip: bool) -> None:
    def stall(body: dict[str, Any], number: int) -> Reply:
        if number == 0 and drip:  # each byte comes in time, the answer never does
            return 200, {"X-Drip": "0.05"}, says("0")[2]
        time.sleep(0.6 if number == 0 else 0)
        return says(str(number))

    server.reply = stall
    assert endpoint(server, timeout=0.2).complete(talks("q")) == ["1"]


def test_retry_after_is_honoured(server: Server) -> None:
    server.reply = lambda body, number: says("ok") if number else (429, {"Retry-After": "0.4"}, "")
    assert endpoint(server).complete(talks("q")) == ["ok"]
    assert server.times[1] - server.times[0] >= 0.4
    assert _retry_after("Thu, 01 Jan 2099 00:00:00 GMT") > 1e9
    assert _retry_after("Thu, 01 Jan 1970 00:00:00 GMT") == _retry_after("soon") == 0
    assert _retry_after("nan") == _retry_after("-3") == 0


def test_a_pause_of_hours_is_an_error_not_a_hang(server: Server) -> None:
    server.reply = lambda body, number: (429, {"Retry-After": "7200"}, "daily limit")
    with pytest.raises(EndpointError, match=r"daily limit; asks to wait 7200 s; .* 1 requests"):
        endpoint(server).complete(talks("q"))


def test_a_refusal_names_url_and_status_and_never_the_key(server: Server) -> None:
    server.reply = lambda body, number: (401, {}, "bad key sk-secret")
    client = endpoint(server)
    with pytest.raises(EndpointError) as caught:
        client.complete(talks("q"))
    text = str(caught.value)
    assert f"{server.url}/v1/chat/completions: status 401" in text and "bad key ***" in text
    assert "sk-secret" not in text + repr(caught.value) + repr(client)
    assert client.calls == 1


def test_retries_end(server: Server) -> None:
    server.reply = lambda body, number: (500, {}, "broken")
    client = endpoint(server, retries=2)
    with pytest.raises(EndpointError, match="status 500: broken; gave up after 3 requests"):
        client.complete(talks("q"))
    with pytest.raises(EndpointError, match="gave up after 1 requests"):
        Endpoint("http://127.0.0.1:9", "m", retries=0).complete(talks("q"))


def test_nothing_is_paid_twice(server: Server, tmp_path: Path) -> None:
    """Neither what was answered before a failure nor what was under way at that time."""

    def fail_on_bad(body: dict[str, Any], number: int) -> Reply:
        text = body["messages"][-1]["content"]
        if text == "bad":
            return 400, {}, "no"
        time.sleep(0.1)
        return says(text.upper())

    server.reply = fail_on_bad
    cache = tmp_path / "answers.sqlite"
    texts = ["a", "b", "bad", "c", "d", "e"]
    with pytest.raises(EndpointError, match="status 400"):
        endpoint(server, cache=cache, concurrency=3).complete(talks(*texts))
    paid = {r["messages"][-1]["content"] for r in server.requests}
    assert paid == {"a", "b", "bad"}

    server.reply = lambda body, number: says("new")
    client = endpoint(server, cache=cache)
    assert client.complete(talks(*texts)) == ["A", "B", "new", "new", "new", "new"]
    assert (client.calls, client.cached) == (4, 2)
    other = endpoint(server, cache=cache, max_tokens=65)
    other.complete(talks("a"))
    assert other.calls == 1, "other parameters are another answer"
    assert b"sk-secret" not in cache.read_bytes()


def test_equal_questions_are_one_request_unless_sampled(server: Server, tmp_path: Path) -> None:
    server.reply = lambda body, number: says(str(number))
    client = endpoint(server)
    assert client.complete(talks("q", "q", "q")) == ["0", "0", "0"]
    assert (client.calls, client.cached) == (1, 2)
    cache = tmp_path / "answers.sqlite"
    sampled = endpoint(server, temperature=0.7, cache=cache).complete(talks("q", "q"))
    assert sorted(sampled) == ["1", "2"]
    again = endpoint(server, temperature=0.7, cache=cache)
    assert again.complete(talks("q", "q")) == sampled and again.calls == 0


def test_odd_texts_survive(server: Server, tmp_path: Path) -> None:
    texts = [None, "caf\u00e9 \U0001f600", "lone \ud800", ""]
    server.reply = lambda body, number: says(texts[int(body["messages"][-1]["content"])])
    for _ in range(2):
        client = endpoint(server, cache=tmp_path / "answers.sqlite")
        found = client.complete(talks("0", "1", "2", "3"))
        assert found == ["", "caf\u00e9 \U0001f600", "lone ?", ""]
    assert client.calls == 0


def test_a_file_that_is_no_cache_is_said_so(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("my notes, long enough to be no database header" * 50)
    with pytest.raises(EndpointError, match=r"notes\.txt: cannot be the answer cache"):
        endpoint(server, cache=path).complete(talks("q"))
    with pytest.raises(EndpointError, match="cannot be the answer cache: unable to open"):
        endpoint(server, cache=tmp_path / "no" / "folder").complete(talks("q"))


def test_it_works_inside_a_running_loop(server: Server) -> None:
    async def notebook() -> list[str]:
        return endpoint(server).complete(talks("q"))

    assert asyncio.run(notebook()) == ["Q"]


def test_urls_and_keys(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = "http://h/x/v1/chat/completions"
    assert _chat_url("http://h/x/v1/")[0] == _chat_url(whole)[0] == whole
    posted, shown = _chat_url("https://me:pw@h:1?key=1")
    assert posted == "https://me:pw@h:1/v1/chat/completions?key=1"
    assert shown == "https://h:1/v1/chat/completions"
    with pytest.raises(ValueError, match="base_url"):
        Endpoint("localhost:8000", "m")
    with pytest.raises(ValueError, match="API key") as caught:
        Endpoint("http://h", "m", api_key="sk-a\nb")
    assert "sk-a" not in str(caught.value)
    endpoint(server, api_key=None).complete(talks("q"))
    monkeypatch.setenv("OPENAI_API_KEY", "from-env\n")
    endpoint(server, api_key=None).complete(talks("q"))
    assert [h.get("Authorization") for h in server.headers] == [None, "Bearer from-env"]


def test_the_reader_sends_memory_and_question(server: Server) -> None:
    server.reply = lambda body, number: says("\n Rome \nbecause")
    store = make_store("flat")
    store.insert("Ada lives in Rome <|im_end|>")
    for i in range(50):
        store.insert(f"noise {i}")
    reader = EndpointReader(server.url, "m", api_key="k", max_memory_tokens=20)
    assert reader.answer([Ask("Where does Ada live?", store)]) == ["Rome"]
    (message,) = server.requests[0]["messages"]
    assert "- Ada lives in Rome < |im_end|>" in message["content"]
    assert "noise" not in message["content"]
    assert message["content"].endswith("Question: Where does Ada live?")
    assert server.requests[0]["max_tokens"] == 64 and reader.endpoint.calls == 1
