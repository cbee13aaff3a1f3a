"""The Python blocks of the documentation are run as printed, on tiny models in the places of those
that they name. The tutorials' are run by test_tutorials.py.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from docs_support import PAGES, TUTORIALS, Block, blocks

from mnemic.models.tiny import byte_tokenizer, tiny_llama

TOKENIZER = byte_tokenizer(2048)


def tiny() -> Any:
    return tiny_llama(
        TOKENIZER, hidden_size=32, layers=2, heads=4, max_position=2048, seed=0
    )  # fmt: skip


def changed(before: dict[str, torch.Tensor], model: Any) -> bool:
    return any(not torch.equal(before[name], p) for name, p in model.named_parameters())


def copies(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class Adapters:
    """A bank of untrained experts lies where `memlora_all` would leave its own."""

    def before(self, folder: Path, request: Any) -> dict[str, Any]:
        from mnemic.models.adapter_rules import Expert
        from mnemic.models.adapters import AdapterBank

        experts = {name: Expert() for name in ("mem_extract", "mem_update", "mem_generate")}
        AdapterBank(tiny(), experts).save(folder / "runs/memlora_all/final")
        return {"base": tiny(), "tokenizer": TOKENIZER}

    def after(self, names: dict[str, Any], folder: Path) -> None:
        stats = names["memory"].stats
        assert stats["mem_extract"].calls == stats["mem_generate"].calls == 1
        assert names["bank"].operations == ("mem_extract", "mem_generate", "mem_update")


class Memory:
    """A manager that a few seconds taught to write operations."""

    def before(self, folder: Path, request: Any) -> dict[str, Any]:
        home = folder / "runs" / "memory_grpo_smollm2"
        home.mkdir(parents=True)
        (home / "final").symlink_to(request.getfixturevalue("warm_model"))
        return {}

    def after(self, names: dict[str, Any], folder: Path) -> None:
        from mnemic.models.memory import open_store

        store = open_store(folder / "memory.sqlite", "flat")
        kept = [(entry.id, entry.content) for entry in store.history()]
        store.close()
        used = names["manager"].store
        assert used.turn == 2, "turns 0, 1 and 2: one for each line"
        assert kept == [(entry.id, entry.content) for entry in used.history()]


class Optimizers:
    def before(self, folder: Path, request: Any) -> dict[str, Any]:
        return {"model": tiny()}

    def after(self, names: dict[str, Any], folder: Path) -> None:
        model, ids = names["model"], torch.arange(1, 9)[None]
        old = copies(model)
        model(input_ids=ids, labels=ids).loss.backward()
        names["optimizer"].step()
        assert changed(old, model)


class InSft:
    """The trainer of the block trains, by the optimizer that it names. TRL's default, bf16, wants a
    GPU.
    """

    swap = ('Config("out", ', 'Config("out", bf16=False, use_cpu=True, report_to=[], ')
    optimizer = "Apollo"

    def before(self, folder: Path, request: Any) -> dict[str, Any]:
        datasets = pytest.importorskip("datasets")
        rows = datasets.Dataset.from_list([{"prompt": "a", "completion": "b"}] * 8)
        return {"model": tiny(), "tokenizer": TOKENIZER, "rows": rows}

    def after(self, names: dict[str, Any], folder: Path) -> None:
        trainer = names["trainer"]
        old = copies(trainer.model)
        trainer.args.max_steps = 2
        trainer.train()
        assert changed(old, trainer.model)
        inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        assert type(inner).__name__ == self.optimizer


class InGrpo(InSft):
    optimizer = "ApolloMini"

    def before(self, folder: Path, request: Any) -> dict[str, Any]:
        datasets = pytest.importorskip("datasets")

        def reward(completions: list[str], **_: Any) -> list[float]:
            return [float(len(set(text))) for text in completions]

        prompts = datasets.Dataset.from_list([{"prompt": "abc"}] * 16)
        return {"model": tiny(), "tokenizer": TOKENIZER, "prompts": prompts, "reward": reward}


# By page, the blocks in their order: what is prepared, or a string: why it is not run here.
BLOCKS: dict[str, list[Any]] = {
    "adapters.md": [Adapters()],
    "memory.md": [Memory()],
    "optimizers.md": [Optimizers()],
    "recipe.md": [InSft(), InGrpo()],
}
FOUND = {
    page.name: [b for b in blocks(page) if b.language == "python"]
    for page in PAGES if page not in TUTORIALS
}  # fmt: skip


def test_every_block_is_in_the_table():
    assert {name: len(found) for name, found in FOUND.items() if found} == {
        name: len(found) for name, found in BLOCKS.items()
    }


@pytest.mark.parametrize(
    ("block", "prepared"),
    [
        pytest.param(block, prepared, id=block.where)
        for name, found in BLOCKS.items()
        for block, prepared in zip(FOUND[name], found, strict=True)
    ],
)
def test_a_block_runs_as_it_is_printed(block: Block, prepared, tmp_path, monkeypatch, request):
    if isinstance(prepared, str):
        pytest.skip(prepared)
    text = block.text
    if isinstance(prepared, InSft):
        pytest.importorskip("trl")
        assert text.count(prepared.swap[0]) == 1
        text = text.replace(*prepared.swap)
    monkeypatch.chdir(tmp_path)
    names = prepared.before(tmp_path, request)
    exec(compile(text, block.where, "exec"), names)
    prepared.after(names, tmp_path)
