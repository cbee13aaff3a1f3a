"""A teacher behind an OpenAI-compatible endpoint, and the distill commands in this process."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from mnemic.train.cli import main


class TeacherServer:
    """`reply(prompt)` gives the text, or (text, finish_reason), or a status; prompts are counted in
    `asked`.
    """

    def __init__(self, reply: Callable[[str], Any]) -> None:
        self.reply, self.asked = reply, []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = body["messages"][-1]["content"]
                server.asked.append(prompt)
                said = server.reply(prompt)
                status = said if isinstance(said, int) else 200
                text, reason = said if isinstance(said, tuple) else (said, "stop")
                choice = {"message": {"role": "assistant", "content": text}}
                answer = {"choices": [choice | {"finish_reason": reason}]}
                data = json.dumps(answer if status == 200 else {"error": "broken"}).encode()
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:
                    self.close_connection = True  # the client gave up, as a test wants it to

            def log_message(self, *args: Any) -> None:
                """Not among the output of tests."""

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()


def distill(*args: Any) -> int:
    return main(["distill", *map(str, args)])


def collect_gold(out: Path, episodes: int = 6, *more: Any) -> int:
    return distill("collect", out, *gold_arguments(episodes), *more)


def gold_arguments(episodes: int) -> list[Any]:
    return ["--teacher", "gold", "--suite", "kvstream", "--episodes", episodes]


def http_arguments(url: str, episodes: int) -> list[Any]:
    return [
        "--teacher", url, "--teacher-model", "big", "--suite", "kvstream", "--episodes", episodes,
        "--retries", 0,
    ]  # fmt: skip


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def prompt_of(row: dict[str, Any]) -> str:
    return row["prompt"][-1]["content"]


def rules_of(out: Path) -> dict[str, str]:
    """Key -> rule of what was dropped."""
    return {row["key"]: row["rule"] for row in lines_of(out / "clean" / "dropped.jsonl")}


def clean_keys(out: Path) -> set[str]:
    return {row["key"] for path in (out / "clean").glob("mem_*.jsonl") for row in lines_of(path)}


def good_and_bad(gold, bad):
    """What gold says, but to the prompts of `bad`."""
    known = {prompt_of(row): row["reply"] for row in gold}

    def reply(prompt):
        if prompt in bad:
            found = bad[prompt]
            return found() if callable(found) else found
        silent = "noop" if prompt.startswith("Bring") else "none"
        return known.get(prompt, silent)

    return reply
