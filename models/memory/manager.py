"""A trained memory manager beside any agent: give it what was said, ask it later.

Each text is read as in training (prompt.py, turn.py): chunk by chunk, each in a fresh context with
a view of the memory, and what the model writes is carried out call by call. `recall` is a search
and runs no model.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from mnemic.models.memory.answer import Answerer, Ask
from mnemic.models.memory.episode import MemoryConfig
from mnemic.models.memory.prompt import render
from mnemic.models.memory.store import Change, Entry, Memory
from mnemic.models.memory.syntax import make_syntax
from mnemic.models.memory.text import split_text
from mnemic.models.memory.turn import TurnResult, run_turn
from mnemic.models.memory.view import View

log = logging.getLogger("mnemic")

CONFIG_FILE = "memory.json"


class MemoryManager:
    """`model` writes, `tokenizer` is its own, `config` says how it was trained to. `store` goes on
    from a memory that is there, of the kind in `config`; None begins with an empty one. `answerer`
    answers `reflect`; None is the model itself, its adapters off where it has them.

    `chunk_tokens` (the tokenizer's) is what one turn reads; `errors` counts the calls of the model
    that could not be read or carried out. Not for several threads at once.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        config: MemoryConfig,
        *,
        store: Memory | None = None,
        answerer: Answerer | None = None,
        chunk_tokens: int = 1024,
    ) -> None:
        if chunk_tokens < 1:
            raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.store = store if store is not None else config.make_store()
        self.answerer = answerer
        self.errors = 0
        self._syntax = make_syntax(config.syntax)
        self._context = getattr(model.config, "max_position_embeddings", None)
        self._chunk_tokens = chunk_tokens
        if self._context is not None:
            self._chunk_tokens = max(1, min(chunk_tokens, self._context // 2))
        # Turns go on over the life of the memory: recency and histories are told by them.
        past = [entry.changed for entry in self.store.history()]
        past += [turn for _, turn in self.store.core_history()]
        self._turn = max(past, default=-1) + 1
        self._last_errors: list[str] = []

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        store: str | Path | Memory | None = None,
        answerer: Answerer | None = None,
        device: str = "auto",
        chunk_tokens: int = 1024,
    ) -> "MemoryManager":
        """From what a memory run exports: an HF or PEFT folder with memory.json. `store`: a memory,
        or the SQLite file that keeps it, made where there is none, and open until
        `manager.store.close()`.

        Raises:
            LoadError: the model or its base cannot be loaded.
            ValueError: memory.json or the file of the memory is not one.
        """
        from mnemic.models.memory.model_reader import load_reader
        from mnemic.models.memory.sqlite import open_store

        config = read_config(path)
        model, tokenizer = load_reader(path, device=device)
        if isinstance(store, str | Path):
            store = open_store(
                store, config.store, max_tokens=config.max_tokens, core_tokens=config.core_tokens,
                max_content=config.max_content,
            )  # fmt: skip
        return cls(
            model, tokenizer, config, store=store, answerer=answerer, chunk_tokens=chunk_tokens
        )

    def retain(self, text: str, *, time: str | None = None) -> list[Change]:
        """Let the model keep what is worth keeping of `text`, said at `time`; what changed, in
        order. Where generation fails, earlier chunks stay stored and its error is raised.
        """
        # The line that dated sessions begin with in the training data.
        head = f"Date: {' '.join(time.split())}"[:100] + "\n" if time else ""
        limit = max(1, self._chunk_tokens - self._count(head))
        changes: list[Change] = []
        for chunk in split_text(text, limit, self._count):
            changes += self._read(head + chunk).changes
        return changes

    def recall(self, query: str, k: int = 10) -> list[Entry]:
        """Entries that share words with `query`, best first. Runs no model."""
        return self.store.search(query, k)

    def reflect(self, question: str) -> str:
        """An answer in few words from what is remembered."""
        if self.answerer is None:
            from mnemic.models.memory.model_reader import ModelReader, SelfReader

            own = SelfReader if hasattr(self.model, "disable_adapter") else ModelReader
            self.answerer = own(self.model, self.tokenizer)
        return self.answerer.answer([Ask(question, self.store)])[0]

    def _read(self, chunk: str) -> TurnResult:
        """One turn."""
        from mnemic.models.generation import generate

        view, prompt = self._observe(chunk)
        eos, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        (found,) = generate(
            self.model, [prompt], eos_id=eos, pad_id=eos if pad is None else pad,
            max_new_tokens=self.config.max_new_tokens,
        )  # fmt: skip
        # As training decodes: stray marks stay, and the parser refuses them.
        ids = found.ids if found.cut else found.ids[:-1]
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        self.store.turn = self._turn
        self._turn += 1
        result = run_turn(self.store, text, view, self._syntax, cut=found.cut)
        self._last_errors = result.errors
        self.errors += len(result.errors)
        for error in result.errors:
            log.warning("memory turn %d: %s", self.store.turn, error)
        return result

    def _observe(self, chunk: str) -> tuple[View, list[int]]:
        """What is shown, and the prompt that shows it, within the model's context: a smaller view
        where a whole one does not fit beside the chunk.
        """
        policy = self.config.policy()
        while True:
            view = policy.render(self.store, chunk)
            prompt = render(
                self.tokenizer, syntax=self._syntax, store=self.store, view_text=view.text,
                chunk=chunk, form=self.config.form, errors=self._feedback(),
            )  # fmt: skip
            room = None if self._context is None else self._context - self.config.max_new_tokens
            if room is None or len(prompt) <= room:
                return view, prompt
            if not view.ids:
                log.warning(
                    "a memory prompt of %d tokens and %d new ones exceed the model's context of %d",
                    len(prompt), self.config.max_new_tokens, self._context,
                )  # fmt: skip
                return view, prompt
            shown = self.store.count(view.text)
            policy = replace(policy, max_tokens=min(policy.max_tokens, shown) // 2)

    def _feedback(self) -> Sequence[str]:
        return self._last_errors[:8] if self.config.feedback else ()

    def _count(self, text: str) -> int:
        return len(self.tokenizer(text, add_special_tokens=False).input_ids)


def read_config(path: str | Path) -> MemoryConfig:
    """The memory.json in a model's folder: `MemoryConfig`'s fields. The defaults, with a warning,
    where there is none. ValueError, naming the key, where it says something else.
    """
    from pydantic import TypeAdapter, ValidationError

    file = Path(path) / CONFIG_FILE
    if not file.is_file():
        log.warning(
            "%s: no %s, so the memory is of kind typed, changed by tool calls in a chat; "
            "a manager trained otherwise will write nothing that can be read", path, CONFIG_FILE,
        )  # fmt: skip
        return MemoryConfig()
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: must be an object")
    allowed = [f.name for f in fields(MemoryConfig)]
    for key in raw:
        if key not in allowed:
            raise ValueError(f"{file}: unknown key {key!r}; allowed are {', '.join(allowed)}")
    try:
        return TypeAdapter(MemoryConfig).validate_json(json.dumps(raw), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{file}: {where}: {first['msg']}") from None
