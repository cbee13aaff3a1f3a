"""Whether a row's form suits an objective. No torch, no tokenizer."""

from mnemic.train.data.formats import as_example, as_text
from mnemic.train.data.rows import Row
from mnemic.train.recipe.training import LmObjective, SftObjective


def check_row(row: Row, objective: LmObjective | SftObjective) -> None:
    """Raise `FormatError` if the objective cannot use the row."""
    if isinstance(objective, LmObjective):
        as_text(row.fields)
    else:
        as_example(row.fields)
