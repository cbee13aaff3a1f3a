"""The three shapes of a memory, by the names a recipe uses."""

from collections.abc import Callable
from typing import Literal

from mnemic.models.memory.retrieve import Index
from mnemic.models.memory.store import Memory, count_pieces

StoreKind = Literal["typed", "flat", "text"]


def make_store(
    kind: StoreKind,
    *,
    max_tokens: int | None = None,
    core_tokens: int = 512,
    max_content: int = 256,
    count: Callable[[str], int] = count_pieces,
    index: Callable[[], Index] | None = None,
) -> Memory:
    """An empty memory; limits are in tokens as `count` counts them, `index` as in `Memory`.

    `typed`: core text, `semantic` facts and `episodic` events, which carry a time. `flat`: a bank
    of facts. `text`: one text, rewritten whole.
    """
    kinds = {"typed": ("semantic", "episodic"), "flat": ("fact",), "text": ()}
    if kind not in kinds:
        raise ValueError(f"a memory is one of {', '.join(kinds)}, got {kind!r}")
    return Memory(
        kinds[kind], core_tokens=0 if kind == "flat" else core_tokens, max_tokens=max_tokens,
        max_content=max_content, count=count, index=index,
    )  # fmt: skip
