"""The cells of the combination matrix: seven axes of a recipe, the recipe of a cell, and a walk in
which every two values meet.

An axis is a section of the recipe, or the number of processes. What a value means depends on the
rest of the cell where the recipe offers one thing here and another there: `offload` is the place of
weights and states with `update: streamed` (and of layer inputs, for ssd), and that of saved
activations with the others, whose weights do not move; `tokens` is `drop` for objective lm, where
every token is supervised, and `protect` for the others.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any, NamedTuple

AXES: dict[str, tuple[Any, ...]] = {
    "objective": ("lm", "sft", "distill", "grpo"),
    "optimizer": ("adamw", "apollo", "apollo_mini", "adamw8bit"),
    "update": ("plain", "in_backward", "streamed"),
    "offload": ("none", "host", "ssd"),
    "tokens": ("off", "on"),
    "adapters": ("none", "lora", "bank"),
    "ranks": (1, 2),
}

STEPS, BATCH = 3, 4
# Matrices of 4,096 elements, adapters' too: below that adamw8bit keeps the moments of adamw.
WIDTH = RANK = 64
OPERATIONS = ("mem_extract", "mem_update")
MODEL = {"kind": "tiny", "hidden_size": WIDTH, "layers": 2, "heads": 4, "max_position": 256}
STREAM = {
    "n_chunks": 2, "events_per_chunk": 2, "n_entities": 2, "n_attributes": 2, "n_values": 4,
    "p_update": 0.3,
}  # fmt: skip
MEMORY = {
    "store": "flat", "retrieved": 4, "recent": 2, "view_tokens": 64, "syntax": "lines",
    "form": "text", "max_new_tokens": 16,
}  # fmt: skip


class Cell(NamedTuple):
    objective: str
    optimizer: str
    update: str
    offload: str
    tokens: str
    adapters: str
    ranks: int

    def __str__(self) -> str:
        return " ".join(map(str, self))


def all_cells() -> list[Cell]:
    return [Cell(*values) for values in product(*AXES.values())]


def neighbours(cell: Cell, axis: str) -> Iterator[Cell]:
    """The cells that differ from `cell` in `axis` alone."""
    for value in AXES[axis]:
        if value != getattr(cell, axis):
            yield cell._replace(**{axis: value})


@dataclass
class Materials:
    """Files that cells train on, in one folder."""

    folder: Path

    @property
    def teacher(self) -> Path:
        return self.folder / "teacher"

    @property
    def policy(self) -> Path:
        """A model that writes memory operations half of the time, so that rollouts differ."""
        return self.folder / "policy" / "final"


def write_rows(folder: Path) -> Materials:
    """What cells are judged by: text and rows, without models."""
    lines = (f"Line {i}: the fox jumps over {i * 7 % 11} lazy dogs.\n" for i in range(200))
    (folder / "text.txt").write_text("".join(lines))
    rows = (
        {
            "prompt": f"Row {i} tells of {i % 13} red and {i % 7} blue marbles. All marbles: ",
            "completion": str(i % 13 + i % 7),
            "operation": OPERATIONS[i % len(OPERATIONS)],
        }
        for i in range(40)
    )
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Materials(folder)


def make_materials(folder: Path, train: Callable[[dict[str, Any]], Any]) -> Materials:
    """Text, rows, a teacher and a policy in `folder`. `train` runs the recipe of a tree."""
    from mnemic.models.tiny import byte_tokenizer, tiny_llama

    made = write_rows(folder)
    tokenizer = byte_tokenizer(MODEL["max_position"])
    teacher = tiny_llama(
        tokenizer, hidden_size=32, layers=1, heads=2, max_position=MODEL["max_position"], seed=7
    )
    # As first drawn, a model gives all tokens one probability, which teaches nothing.
    teacher.get_input_embeddings().weight.data.mul_(15)
    teacher.save_pretrained(made.teacher)
    tokenizer.save_pretrained(made.teacher)
    train({
        "name": "policy", "run_dir": str(made.policy.parent),
        "model": {**MODEL, "vocab_size": 512}, "memory": MEMORY,
        "data": {"kind": "kvstream", "size": 400, "stream": {**STREAM, "n_chunks": 3}},
        "objective": {"kind": "sft", "max_length": 160},
        "optimizer": {"kind": "adamw", "lr": 5e-3, "beta2": 0.98},
        "loop": {"steps": 80, "batch_size": 16},
    })  # fmt: skip
    return made


def tree_of(cell: Cell, made: Materials, run_dir: Path) -> dict[str, Any]:
    """The recipe of `cell`. No clipping: each update has a kind of its own."""
    tree: dict[str, Any] = {
        "name": "cell", "run_dir": str(run_dir), "model": MODEL,
        "data": {"kind": "jsonl", "path": str(made.folder / "rows.jsonl")},
        "objective": {"kind": cell.objective, "max_length": 96},
        "optimizer": {"kind": cell.optimizer, "lr": 1e-3},
        "update": {"kind": cell.update},
        "offload": {"kind": cell.offload},
        "tokens": {"kind": "none"},
        "adapters": {"kind": cell.adapters},
        "loop": {"steps": STEPS, "batch_size": BATCH, "schedule": "constant", "device": "cpu"},
    }  # fmt: skip
    if cell.update == "plain":
        tree["update"]["max_grad_norm"] = None
    if cell.adapters != "none":
        tree["adapters"] |= {"r": RANK, "alpha": 2 * RANK}
    if cell.adapters == "bank":
        tree["adapters"]["operations"] = list(OPERATIONS)
    if cell.tokens == "on":
        tree["tokens"] = {"kind": "protect", "block": 4}
    if cell.offload != "none" and cell.update != "streamed":
        tree["offload"] = {"activations": cell.offload}
    elif cell.offload == "ssd":
        tree["offload"]["activations"] = "ssd"
    if cell.objective == "lm":
        tree["data"] = {"kind": "text", "path": str(made.folder / "text.txt")}
        tree["objective"] = {"kind": "lm", "seq_len": 48}
        if cell.tokens == "on":
            tree["tokens"] = {"kind": "drop", "block": 4, "protect": False}
    elif cell.objective == "distill":
        tree["objective"]["teacher"] = {
            "kind": "pretrained", "path": str(made.teacher), "dtype": "fp32",
        }  # fmt: skip
    elif cell.objective == "grpo":
        tree["model"] = {"kind": "pretrained", "path": str(made.policy), "dtype": "fp32"}
        tree["data"] = {"kind": "kvstream", "size": 50, "stream": STREAM}
        tree["memory"] = MEMORY
        tree["objective"] = {
            "kind": "grpo", "num_generations": 2, "max_length": 160, "credit": "pooled_turn",
        }  # fmt: skip
    return tree


def pairwise(first_choice: Callable[[Cell], bool]) -> list[Cell]:
    """Cells in which every two values of different axes meet; of pairs that a cell with
    `first_choice` has, in such a cell. Greedy: the cell with most pairs that are still to come, the
    first of them in the order of `all_cells`.
    """
    cells = all_cells()
    chosen: list[Cell] = []
    left = {pair for cell in cells for pair in _pairs(cell)}
    for group in ([c for c in cells if first_choice(c)], cells):
        pairs = {cell: _pairs(cell) for cell in group}
        while True:
            best = max(group, key=lambda cell: len(pairs[cell] & left), default=None)
            if best is None or not pairs[best] & left:
                break
            chosen.append(best)
            left -= pairs[best]
    return chosen


def _pairs(cell: Cell) -> set[tuple[tuple[int, Any], ...]]:
    return set(combinations(enumerate(cell), 2))
