"""The manager beside an agent: what it reads, keeps over processes, recalls and answers."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mnemic.models.generation import Generated
from mnemic.models.memory import (
    Ask,
    MemoryConfig,
    MemoryManager,
    ModelReader,
    RuleReader,
    make_store,
)
from mnemic.models.memory.manager import read_config
from mnemic.models.tiny import byte_tokenizer, tiny_llama

LINES = MemoryConfig(
    store="flat", max_content=40, retrieved=3, view_tokens=300, syntax="lines", form="text",
    max_new_tokens=64,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a memory run exports."""
    path = tmp_path_factory.mktemp("manager")
    tokenizer = byte_tokenizer()
    model = tiny_llama(tokenizer, hidden_size=16, layers=1, heads=2, max_position=1024, seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # so wide that it babbles instead of repeating its last token
            parameter.data.normal_(std=0.3, generator=generator)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "memory.json").write_text(json.dumps(asdict(LINES)))
    return path


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Let the model write these texts, one a turn; returns the prompts it is shown."""

    def script(*texts: str) -> list[str]:
        tokenizer = byte_tokenizer()
        prompts: list[str] = []
        left = list(texts)

        def generate(model: Any, asked: list[list[int]], **settings: Any) -> list[Generated]:
            (ids,) = asked
            assert len(ids) + settings["max_new_tokens"] <= 1024
            prompts.append(tokenizer.decode(ids))
            text = left.pop(0)
            if text == "fail":
                raise RuntimeError("out of memory")
            cut = text.endswith("...")
            end = [] if cut else [settings["eos_id"]]
            return [Generated(tokenizer(text).input_ids + end, cut)]

        monkeypatch.setattr("mnemic.models.generation.generate", generate)
        return prompts

    return script


def load(folder: Path, **settings: Any) -> MemoryManager:
    return MemoryManager.from_pretrained(folder, device="cpu", **settings)


def contents(manager: MemoryManager) -> list[str]:
    return [entry.content for entry in manager.store.entries()]


def test_what_was_said_is_kept_changed_and_found(folder: Path, says: Any) -> None:
    prompts = says("+ Ada city Rome\n+ Ben pet cat", "= m0 Ada city Oslo\n- m1", "noop")
    manager = load(folder, answerer=RuleReader())
    changes = manager.retain("Ada lives in Rome. Ben has a cat.", time="2024-05-01")
    assert [(c.op, c.id, c.after) for c in changes] == [
        ("insert", "m0", "Ada city Rome"), ("insert", "m1", "Ben pet cat"),
    ]  # fmt: skip
    assert [c.op for c in manager.retain("Ada moved to Oslo, the cat of Ben died.")] == [
        "update", "delete",
    ]  # fmt: skip
    assert manager.retain("Hello!") == []
    assert "new:\nDate: 2024-05-01\nAda lives in Rome." in prompts[0]
    assert "m0 Ada city Rome" in prompts[1] and "2024" not in prompts[1]
    assert [e.content for e in manager.recall("where is Ada")] == ["Ada city Oslo"]
    assert manager.reflect("Ada city?") == "oslo"
    assert manager.errors == 0
    assert [(e.turn, e.changed) for e in manager.store.history()] == [(0, 1), (0, 1)]


def test_recall_runs_no_model(folder: Path, says: Any) -> None:
    manager = load(folder)
    for i in range(20):
        manager.store.insert(f"fact {i}")
    manager.model = None
    assert len(manager.recall("fact")) == 10
    assert [e.content for e in manager.recall("fact 7", k=1)] == ["fact 7"]


def test_long_text_is_read_in_fresh_chunks(folder: Path, says: Any) -> None:
    prompts = says(*[f"+ note {i}" for i in range(4)])
    lines = [f"line {i} of what they talked about" for i in range(8)]
    manager = load(folder, chunk_tokens=70)  # bytes: two lines, but not with their date
    manager.retain("\n".join(lines[:4]), time="May\n1")
    assert contents(manager) == [f"note {i}" for i in range(4)]
    read = [prompt.split("new:\n")[1].split("\nops:")[0].split("\n") for prompt in prompts]
    assert read == [["Date: May 1", line] for line in lines[:4]]
    assert "note 2" in prompts[3]
    prompts = says(*["noop"] * 4)
    manager.retain("\n".join(lines))
    assert [prompt.count("of what") for prompt in prompts] == [2, 2, 2, 2]


def test_errors_are_counted_and_lose_nothing(
    folder: Path, says: Any, caplog: pytest.LogCaptureFixture
) -> None:
    says("+ good\n= m9 bad id\nnonsense\n+ half a sent...", "+ more<|user|>", "+ last", "fail")
    manager = load(folder, chunk_tokens=20)
    with caplog.at_level(logging.WARNING, "mnemic"), pytest.raises(RuntimeError, match="memory"):
        manager.retain("first part of it\nsecond part of it\nthird part of it\nfourth part of it")
    assert contents(manager) == ["good", "last"]
    assert manager.errors == 4
    assert "memory turn 0: there is no 'm9' in view" in caplog.text
    assert "memory turn 1: insert: content" in caplog.text
    says("+ and on")
    manager.retain("fourth part of it")
    assert [e.turn for e in manager.store.entries()] == [0, 2, 3]


def test_errors_are_fed_back_where_training_did(folder: Path, says: Any) -> None:
    for feedback in (True, False):
        prompts = says("nonsense", "noop", "noop")
        manager = load(folder)
        manager.config = replace(LINES, feedback=feedback)
        for _ in range(3):
            manager.retain("Hello!")
        assert ["not an operation" in p for p in prompts] == [False, feedback, False]


def test_turns_go_on_where_an_older_memory_stopped(folder: Path, says: Any) -> None:
    says("+ Ada city Rome")
    store = make_store("typed")
    store.turn = 4
    store.rewrite_core("About Ada.")
    store.rewrite_core("")
    load(folder, store=store).retain("Ada lives in Rome.")
    assert [e.turn for e in store.entries()] == [5]


def test_the_prompt_stays_in_the_context(folder: Path, says: Any) -> None:
    manager = load(folder, chunk_tokens=5000)
    for i in range(30):
        manager.store.insert(f"{i} " + "chunky" * 30)  # few pieces, many tokens
    prompts = says("noop", "noop", "noop")
    manager.retain("chunk " * 200)
    assert all("m29" in prompt for prompt in prompts)


def test_a_file_keeps_the_memory_for_another_process(
    folder: Path, says: Any, tmp_path: Path
) -> None:
    file = tmp_path / "memory.sqlite"
    says("+ Ada city Rome", "= m0 Ada city Oslo")
    manager = load(folder, store=file)
    manager.retain("Ada lives in Rome.")
    assert manager.store.max_content == 40 and manager.config == LINES
    manager.store.close()  # type: ignore[attr-defined]
    # Without torch: what needs no model starts at once.
    code = """
import sys
from types import SimpleNamespace
from mnemic.models.memory import MemoryConfig, MemoryManager, open_store
store = open_store(sys.argv[1], "flat")
model = SimpleNamespace(config=None)
manager = MemoryManager(model, None, MemoryConfig(store="flat"), store=store)
print([e.content for e in manager.recall("Ada")], "torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "['Ada city Rome'] False\n"
    manager = load(folder, store=file)
    manager.retain("Ada moved to Oslo.")
    (entry,) = manager.store.entries()
    assert (entry.content, entry.turn, entry.changed) == ("Ada city Oslo", 0, 1)
    manager.store.close()  # type: ignore[attr-defined]


def test_the_model_writes_and_answers_for_real(folder: Path) -> None:
    manager = load(folder)
    manager.retain("Ada lives in Rome.")
    assert manager.errors > 0  # random weights write no operations
    own = ModelReader(manager.model, manager.tokenizer)
    assert manager.reflect("Where?") == own.answer([Ask("Where?", manager.store)])[0] != ""


@pytest.mark.parametrize("adapters", [True, False])
def test_without_an_answerer_the_base_answers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, adapters: bool
) -> None:
    from mnemic.models.lora import add_lora

    manager = load(folder)
    if adapters:
        manager.model = add_lora(
            manager.model, r=2, alpha=4, dropout=0.0, target_modules="all-linear", rslora=False,
            dora=False, quantized=False, seed=0,
        )  # fmt: skip
    off: list[bool] = []

    def generate(model: Any, prompts: list[Any], **settings: Any) -> list[Generated]:
        off.append(adapters and model.get_model_status().enabled is False)
        return [Generated([*b"Rome", settings["eos_id"]], False)]

    monkeypatch.setattr("mnemic.models.generation.generate", generate)
    assert manager.reflect("Where does Ada live?") == "Rome"
    assert off == [adapters]


def test_a_given_answerer_is_asked_with_the_memory(folder: Path) -> None:
    class Echo:
        def answer(self, asks: Any) -> list[str]:
            return [f"{ask.question} {len(ask.memory.entries())}" for ask in asks]

    store = make_store("flat")
    store.insert("one")
    manager = load(folder, store=store, answerer=Echo())
    assert manager.store is store
    assert manager.reflect("how many") == "how many 1"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1]", "must be an object"),
        ("{", "is not JSON"),
        ('{"stor": "flat"}', "unknown key 'stor'"),
        ('{"store": {"kind": "flat"}}', "store: "),
        ('{"form": "song"}', "form: "),
        ('{"max_new_tokens": "64"}', "max_new_tokens: "),
    ],
)
def test_a_wrong_memory_json_is_named(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "memory.json").write_text(text)
    with pytest.raises(ValueError, match=rf"memory\.json: {said}"):
        read_config(tmp_path)


def test_a_plain_model_gets_the_defaults_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "mnemic"):
        assert read_config(tmp_path) == MemoryConfig()
    assert "no memory.json" in caplog.text


def test_the_package_imports_no_torch() -> None:
    code = (
        "import sys, mnemic.models.memory as m; [getattr(m, n) for n in m.__all__]; "
        "print([n for n in ('torch', 'transformers', 'httpx', 'httpx2') if n in sys.modules]); "
        "print(sorted(set(m.__all__) - set(dir(m))), hasattr(m, 'Nothing'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n[] False\n"
