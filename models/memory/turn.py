"""One turn: the text a model wrote for one chunk, read and carried out call by call."""

from dataclasses import dataclass

from mnemic.models.memory.operations import Applied, Noop, apply
from mnemic.models.memory.store import Change, Memory, OperationError
from mnemic.models.memory.syntax import Syntax
from mnemic.models.memory.view import View


@dataclass(frozen=True, slots=True)
class TurnResult:
    """Every call with what became of it, and what the memory looks like for it."""

    applied: list[Applied]
    changes: list[Change]

    @property
    def errors(self) -> list[str]:
        return [one.error for one in self.applied if one.error is not None]

    @property
    def silent(self) -> bool:
        """Whether nothing was asked for: no call at all, or `noop` alone."""
        return all(isinstance(one.operation, Noop) for one in self.applied)


def run_turn(
    store: Memory, text: str, view: View, syntax: Syntax, *, cut: bool = False
) -> TurnResult:
    """Carry out all calls of `text` in order; one that fails changes nothing and stops nothing."""
    before = store.snapshot()
    applied = []
    visible = view.ids
    for call in syntax.parse(text, cut=cut):
        if call.operation is not None:
            try:
                id = apply(store, call.operation, visible=visible)
                call = Applied(call.operation, id, None, call.raw)
            except OperationError as error:
                call = Applied(call.operation, None, str(error), call.raw)
        applied.append(call)
    return TurnResult(applied, store.diff(before))
