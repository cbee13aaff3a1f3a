"""What an adapter bank goes with, and which rows it can be trained on."""

from typing import TYPE_CHECKING

from mnemic.train.recipe.data import FactsData, KvStreamData, OperationsData, TextData
from mnemic.train.recipe.model import Bank

if TYPE_CHECKING:
    from mnemic.train.recipe.recipe import Recipe


def check_bank(recipe: "Recipe") -> list[str]:
    """One sentence for each contradiction."""
    sections = [("data", recipe.data)]
    evaluation = recipe.evaluation
    if evaluation and evaluation.data:
        sections.append(("evaluation.data", evaluation.data))
    kind, found = recipe.objective.kind, []
    if kind not in ("sft", "distill"):
        found += [
            f"{key}.kind=operations needs objective.kind=sft or distill"
            for key, data in sections
            if isinstance(data, OperationsData)
        ]
    bank = recipe.adapters
    if not isinstance(bank, Bank):
        return found
    if kind not in ("sft", "distill"):
        found.append(
            f"adapters.kind=bank trains an expert for each operation of the rows, and objective."
            f"kind={kind} has none; set objective.kind=sft or distill, or adapters=lora"
        )
        # What its data lack follows from that.
        return found
    if len(bank.operations) > 1 and recipe.update.kind == "streamed":
        found.append(
            "update.kind=streamed runs all rows of a step through a layer together, and a bank of "
            f"{len(bank.operations)} operations has an expert for each; train them one by one "
            f"(adapters.operations=[{bank.operations[0]}]), or set update.kind=plain"
        )
    for key, data in sections:
        if isinstance(data, TextData | FactsData | KvStreamData) and len(bank.operations) > 1:
            found.append(
                f"{key}.kind={data.kind} has no column 'operation' that would choose an expert; "
                f"set {key}.kind to operations or jsonl, or adapters.operations to one name"
            )
        if isinstance(data, OperationsData) and (odd := set(data.operations) - {*bank.operations}):
            found.append(
                f"{key}.operations: {min(odd)} is none of adapters.operations "
                f"({', '.join(bank.operations)}); take it out, or add it there"
            )
    return found


def operation_of(fields: dict[str, object], operations: list[str]) -> str:
    """The expert that a row is for. ValueError for a row that names none of them; of a bank with
    one expert a row need not say.
    """
    named = fields.get("operation")
    if named is None and len(operations) == 1:
        return operations[0]
    if named not in operations:
        told = "no column 'operation'" if named is None else f"operation {named!r}"
        raise ValueError(f"{told}; adapters.operations has {', '.join(operations)}")
    return str(named)
