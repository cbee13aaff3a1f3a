"""An episode: a stream read chunk by chunk in fresh contexts, then questions to the memory alone.

The one environment of training, evaluation and use. It neither generates nor answers: a driver asks
`observe` for a prompt, gives the model's text to `step`, and after the last chunk has `asks`
answered by whichever `Answerer` it likes.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mnemic.models.memory.answer import Ask
from mnemic.models.memory.operations import Applied
from mnemic.models.memory.prompt import Form, render
from mnemic.models.memory.store import Memory
from mnemic.models.memory.stores import StoreKind, make_store
from mnemic.models.memory.syntax import SyntaxKind, make_syntax
from mnemic.models.memory.turn import TurnResult, run_turn
from mnemic.models.memory.view import View, ViewPolicy


@dataclass(frozen=True)
class MemoryConfig:
    """Shape and bounds of a memory and how a model works on it; tokens are those of
    `store.count_pieces`. Saved beside an exported model as memory.json.
    """

    store: StoreKind = "typed"
    max_tokens: int | None = None
    core_tokens: int = 512
    max_content: int = 256
    retrieved: int = 8
    recent: int = 4
    view_tokens: int = 1024
    syntax: SyntaxKind = "tools"
    form: Form = "chat"
    max_new_tokens: int = 256
    feedback: bool = False
    """Show the errors of the turn before in the next prompt."""

    def make_store(self) -> Memory:
        return make_store(
            self.store, max_tokens=self.max_tokens, core_tokens=self.core_tokens,
            max_content=self.max_content,
        )  # fmt: skip

    def policy(self) -> ViewPolicy:
        return ViewPolicy(self.retrieved, self.recent, self.view_tokens)


@dataclass(frozen=True, slots=True)
class Turn:
    """What happened at one chunk."""

    chunk: str
    view: View
    text: str
    result: TurnResult
    tokens: int
    """Of the whole memory, behind the turn."""


class MemoryEpisode:
    """`chunks` are read in order; `questions` are asked at the end. `store` goes on from a memory
    that is there; None begins with an empty one.
    """

    def __init__(
        self,
        chunks: Sequence[str],
        questions: Sequence[str],
        config: MemoryConfig,
        *,
        store: Memory | None = None,
    ) -> None:
        self.chunks, self.questions, self.config = list(chunks), list(questions), config
        self.store = store if store is not None else config.make_store()
        self.syntax, self.policy = make_syntax(config.syntax), config.policy()
        self.turns: list[Turn] = []
        # A memory that is there has turns behind it.
        self._first = self.store.turn + 1 if self.store.history() else 0
        self._view: View | None = None

    @property
    def done(self) -> bool:
        return len(self.turns) == len(self.chunks)

    def view(self) -> View:
        """What of the memory is shown beside the next chunk."""
        if self._view is None:
            self._view = self.policy.render(self.store, self.chunks[len(self.turns)])
        return self._view

    def observe(self, tokenizer: Any) -> list[int]:
        """The prompt of the next chunk, token ids: nothing of earlier chunks but the memory."""
        errors = self.turns[-1].result.errors if self.turns and self.config.feedback else []
        return render(
            tokenizer, syntax=self.syntax, store=self.store, view_text=self.view().text,
            chunk=self.chunks[len(self.turns)], form=self.config.form, errors=errors[:8],
        )  # fmt: skip

    def step(self, text: str, *, cut: bool = False) -> TurnResult:
        """Carry out what the model wrote. `cut`: it ran into its token limit."""
        number, view = len(self.turns), self.view()
        self.store.turn = self._first + number
        result = run_turn(self.store, text, view, self.syntax, cut=cut)
        self._view = None
        self.turns.append(Turn(self.chunks[number], view, text, result, self.store.tokens()))
        return result

    def asks(self, store: Memory | None = None) -> list[Ask]:
        """The questions, of this episode's memory or of another in its place."""
        return [Ask(q, self.store if store is None else store) for q in self.questions]

    def stream_tokens(self) -> int:
        """Tokens of all chunks: what compression is measured against."""
        return sum(self.store.count(chunk) for chunk in self.chunks)

    def trace(self) -> list[dict[str, Any]]:
        """Each turn as plain values, for `mnemic memory show`."""
        return [
            {
                "chunk": turn.chunk,
                "view": turn.view.text,
                "text": turn.text,
                "calls": [_call(one) for one in turn.result.applied],
                "changes": [asdict(change) for change in turn.result.changes],
                "memory_tokens": turn.tokens,
            }
            for turn in self.turns
        ]


def _call(one: Applied) -> dict[str, Any]:
    operation = None if one.operation is None else one.operation.model_dump(exclude_none=True)
    return {"operation": operation, "id": one.id, "error": one.error, "raw": one.raw}
