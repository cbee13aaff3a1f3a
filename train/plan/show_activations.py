"""The activation table as text and as plain values. All figures are GiB."""

from dataclasses import asdict
from typing import Any

from mnemic.train.plan.combinations import Combination, Table
from mnemic.train.plan.saved import COMPONENTS

_NAME, _CELL = 34, 9


def gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:,.2f}"


def as_values(table: Table) -> dict[str, Any]:
    """For `--json`, in bytes; `fits`: by tokens of a row, the overrides to take, or null."""
    found = {n: table.cheapest(n) for n in table.lengths}
    return asdict(table) | {"fits": {n: c and c.overrides.get(n) for n, c in found.items()}}


def show(table: Table) -> None:
    share = "all" if table.trained == table.parameters else f"{table.trained:,}"
    print(f"{table.name}: {table.model}")
    print(f"{table.parameters:,} parameters, {share} trained; a forward of {table.rows} row(s)\n")
    own = table.own
    longest = table.lengths[-1]
    print("GiB saved for the backward, and at the peak above weights and gradients; matrix")
    print(f"products at {longest:,} tokens, as a multiple of the first line's")
    _row("tokens of a row", [f"{n:,}" for n in table.lengths], span=2)
    _row("", [*(["saved", "peak"] * len(table.lengths)), "compute"])
    first = next(c for c in table.combinations if c.counted).counted[longest].flops
    for row in table.combinations:
        if not row.refused:
            found = row.counted.values()
            cells = [gib(size) for counted in found for size in (counted.saved, counted.peak)]
            ratio = f"{row.counted[longest].flops / max(1, first):.2f}"
            _row(row.name + (" *" if row.chosen else ""), [*cells, ratio])
    for row in table.combinations:
        if row.refused:
            print(f"{row.name}: not for this recipe: {row.refused}")
    print(f"\nGiB saved, by what saves it: {own.name} *")
    for component in COMPONENTS:
        sizes = [counted.by_component[component] for counted in own.counted.values()]
        if any(sizes):
            _row("  " + component, [gib(size) for size in sizes], span=2)
    print(f"\n* this recipe. Its weights and optimizer state: {gib(own.state)} GiB")
    for length in table.lengths:
        print(recommendation(table, length))
    for note in table.notes:
        print(f"- {note}")


def _row(name: str, cells: list[str], *, span: int = 1) -> None:
    width = _CELL * span
    print(f"{name:<{_NAME}}" + "".join(f"{cell:>{width}}" for cell in cells))


def recommendation(table: Table, length: int) -> str:
    """One sentence."""
    what = "" if table.given else "free here, "
    where = f"{length:,} tokens in {gib(table.budget)} GiB ({what}without the process's own): "
    row = table.cheapest(length)
    if row is not None and row.exact:
        return where + f"the cheapest exact combination is {_named(row, table, length)}"
    smallest = table.smallest(length)
    least = "no exact combination fits"
    if smallest is not None:
        least += f", the smallest is {_named(smallest, table, length)}"
    if row is not None:
        return where + f"{least}; {_named(row, table, length)} does, and drops tokens"
    return where + f"{least}; take offload, fewer rows at once or a smaller model"


def _named(row: Combination, table: Table, length: int) -> str:
    keys = row.overrides.get(length)
    how = ", this recipe's" if row.chosen else f" ({' '.join(keys)})" if keys else ""
    return f"{row.name}{how}: {gib(row.need(length))} GiB with all state"
