"""Every byte that a memory takes beside its frozen base, counted together.

MEMO's point (603 Exemplars): stored examples and grown parameters compete for one budget, so a
method that saves one by spending the other has saved nothing.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch


def byte_budget(
    bank: Any, optimizer: Any = None, *, replay_bytes: int = 0, store: Any = None
) -> dict[str, int]:
    """Bytes by part, and their `total`: the adapters of `bank` (an AdapterBank), the
    optimizer's state (as it is now: none before the first step), replay data, and the store as JSON
    in UTF-8, its history included.
    """
    state = 0 if optimizer is None else sum(map(tensor_bytes, _tensors(dict(optimizer.state))))
    kept = json.dumps(store.snapshot(), ensure_ascii=False) if store is not None else ""
    parts = {
        "adapters": sum(bank.bytes().values()), "optimizer": state, "replay": replay_bytes,
        "store": len(kept.encode()),
    }  # fmt: skip
    return {**parts, "total": sum(parts.values())}


def _tensors(value: Any) -> Iterator[Any]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


def tensor_bytes(tensor: Any) -> int:
    return tensor.numel() * tensor.element_size()
