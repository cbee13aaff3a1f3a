"""The server's client against an HTTP server of the same form; which weights it would be sent."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch

from mnemic.models.lora import add_lora
from mnemic.models.tiny import byte_tokenizer, tiny_llama
from mnemic.train.errors import UserError
from mnemic.train.rollout.vllm import ServerGenerator, served_weights

TOKENIZER = byte_tokenizer(64)
EOS = TOKENIZER.eos_token_id


def model():
    return tiny_llama(TOKENIZER, hidden_size=32, layers=1, heads=4, max_position=64, seed=0)


class Handler(BaseHTTPRequestHandler):
    seen: list = []  # noqa: RUF012

    def reply(self, body):
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.reply({"data": [{"id": "tiny"}]} if "models" in self.path else {})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append(asked)
        # Ended by the server, ended by the token, cut at the limit.
        made = [[65, 66], [67, EOS, 68], [69] * asked["max_tokens"]]
        choices = [
            {"prompt_token_ids": p, "token_ids": ids, "logprobs": None}
            for p, ids in zip(asked["prompt"], made, strict=True)
        ]
        self.reply({"choices": choices})

    def log_message(self, *args):
        pass


@pytest.fixture
def url(monkeypatch):
    client = pytest.importorskip("trl.generation.vllm_client")
    # The client wants the package on the trainer's side too, for the transfer of weights alone.
    monkeypatch.setattr(client, "is_vllm_available", lambda: True)
    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Handler.seen.clear()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_rollouts_come_from_the_server(url):
    made = ServerGenerator(url, model(), TOKENIZER, max_new_tokens=4, timeout=5, sends=False)
    found = made([[1], [2, 3], [4]], seeds=[1, 2, 3])
    assert [one.ids for one in found] == [[65, 66, EOS], [67, EOS], [69] * 4]
    assert [one.cut for one in found] == [False, False, True]
    assert Handler.seen[0]["temperature"] == 1.0 and Handler.seen[0]["prompt"] == [[1], [2, 3], [4]]
    made([[1], [2, 3], [4]], seeds=None)
    assert Handler.seen[1]["temperature"] == 0.0


def test_no_server_and_no_gpu_are_one_sentence_each(url):
    with pytest.raises(UserError, match=r"objective\.generator\.url: .*vllm-serve"):
        ServerGenerator(
            "http://127.0.0.1:9", model(), TOKENIZER, max_new_tokens=4, timeout=0, sends=False
        )
    with pytest.raises(UserError, match="trains on cpu"):
        ServerGenerator(url, model(), TOKENIZER, max_new_tokens=4, timeout=5)


def test_the_served_weights_are_the_plain_models_with_the_adapter_merged():
    adapted = add_lora(
        model(), r=2, alpha=4, dropout=0.0, target_modules="all-linear", rslora=False, dora=False,
        quantized=False, seed=0,
    )  # fmt: skip
    for name, param in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(param)
    adapted.merge_adapter()
    sent = {name: weight.clone() for name, weight in served_weights(adapted)}
    adapted.unmerge_adapter()
    merged = dict(adapted.merge_and_unload().named_parameters())
    assert sent.keys() == merged.keys() == dict(model().named_parameters()).keys()
    for name, weight in merged.items():
        torch.testing.assert_close(sent[name], weight.detach())
