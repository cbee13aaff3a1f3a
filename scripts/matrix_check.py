"""What the results of cells must have in common, and what not.

Exact techniques change nothing: losses and gradient norms of a cell are those of the cell with
`update: plain`, no offload and one process. An optimizer, token sparsity and adapters change
something: equal figures there are a setting without effect.
"""

from dataclasses import dataclass, field

from matrix_cells import AXES, Cell, neighbours
from matrix_try import Result

DIFFERENT = ("optimizer", "tokens", "adapters")


@dataclass
class Comparison:
    """`complaints`: a sentence for each contradiction. `equal`: cells compared with their
    reference, and the largest difference.
    """

    complaints: list[str] = field(default_factory=list)
    equal: int = 0
    largest: float = 0.0
    different: int = 0


def reference(cell: Cell) -> Cell:
    return cell._replace(update="plain", offload="none", ranks=1)


def tolerance(cell: Cell) -> tuple[float, float]:
    """Relative and absolute, as tests/dist has them. Rewards are small numbers that cancel."""
    return (1e-4, 1e-6) if cell.objective == "grpo" else (1e-5, 0.0)


def compare(results: list[Result]) -> Comparison:
    """Of the cells that ran, those whose counterpart is among them."""
    ran = {result.cell: result for result in results if result.status == "ran"}
    found = Comparison()
    for cell, result in ran.items():
        base = reference(cell)
        if base != cell and base in ran:
            _must_equal(found, result, ran[base])
        for axis in DIFFERENT:
            for other in neighbours(cell, axis):
                later = AXES[axis].index(getattr(other, axis)) > AXES[axis].index(
                    getattr(cell, axis)
                )
                if later and other in ran:
                    found.different += 1
                    if (result.losses, result.norms) == (ran[other].losses, ran[other].norms):
                        found.complaints.append(f"{cell}: {axis} changes nothing ({other})")
    return found


def _must_equal(found: Comparison, result: Result, base: Result) -> None:
    relative, absolute = tolerance(result.cell)
    found.equal += 1
    for name in ("losses", "norms"):
        for step, (mine, theirs) in enumerate(
            zip(getattr(result, name), getattr(base, name), strict=True), 1
        ):
            off = max(0.0, abs(mine - theirs) - absolute) / abs(theirs) if mine != theirs else 0.0
            found.largest = max(found.largest, off)
            if off > relative:
                found.complaints.append(
                    f"{result.cell}: {name} of step {step} are {mine:.9g}, and {theirs:.9g} in "
                    f"{base.cell}"
                )
                return
