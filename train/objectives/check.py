"""Whether a row's form suits an objective. No torch, no tokenizer."""

from typing import Any

from mnemic.train.data.formats import FormatError, as_example, as_text
from mnemic.train.data.rows import Row
from mnemic.train.recipe.bank_check import operation_of
from mnemic.train.recipe.memory import GrpoObjective
from mnemic.train.recipe.model import Bank
from mnemic.train.recipe.training import LmObjective, SftObjective


def check_row(
    row: Row, objective: LmObjective | SftObjective | GrpoObjective, adapters: Any = None
) -> None:
    """Raise `FormatError` if the objective, or a bank of adapters, cannot use the row."""
    if isinstance(objective, GrpoObjective):
        from mnemic.train.data.memory.episode import as_episode

        as_episode(row.fields)
    elif isinstance(objective, LmObjective):
        as_text(row.fields)
    else:
        as_example(row.fields)
    expert_of(row, adapters)


def expert_of(row: Row, adapters: Any) -> str | None:
    """The operation of a row, where `adapters` are a bank. `FormatError` if it has none."""
    if not isinstance(adapters, Bank):
        return None
    try:
        return operation_of(row.fields, adapters.operations)
    except ValueError as error:
        raise FormatError(str(error)) from None
