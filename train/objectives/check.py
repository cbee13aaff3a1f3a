"""Whether a row's form suits an objective. No torch, no tokenizer."""

from mnemic.train.data.formats import as_example, as_text
from mnemic.train.data.rows import Row
from mnemic.train.recipe.memory import GrpoObjective
from mnemic.train.recipe.training import LmObjective, SftObjective


def check_row(row: Row, objective: LmObjective | SftObjective | GrpoObjective) -> None:
    """Raise `FormatError` if the objective cannot use the row."""
    if isinstance(objective, GrpoObjective):
        from mnemic.train.data.memory.episode import as_episode

        as_episode(row.fields)
    elif isinstance(objective, LmObjective):
        as_text(row.fields)
    else:
        as_example(row.fields)
