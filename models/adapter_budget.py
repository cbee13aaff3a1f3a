"""Every byte that a memory takes beside its frozen base, counted together.

MEMO's point (603 Exemplars): stored examples and grown parameters compete for one budget, so a
method that saves one by spending the other has saved nothing.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch


def byte_budget(
    bank: Any, optimizer: Any = None, *, replay_bytes: int = 0, store: Any = None,
    store_bytes: int = 0,
) -> dict[str, int]:  # fmt: skip
    """Bytes by part, and their `total`: the adapters of `bank` (an AdapterBank, or a model: its
    trained weights), the optimizer's state (as it is now: none before the first step), replay data,
    and the store (or `store_bytes` of one) as JSON in UTF-8, its history included.
    """
    state = 0 if optimizer is None else sum(map(tensor_bytes, _tensors(dict(optimizer.state))))
    if hasattr(bank, "operations"):
        adapters = sum(bank.bytes().values())
    else:
        adapters = sum(tensor_bytes(p) for p in bank.parameters() if p.requires_grad)
    if store is not None:
        store_bytes = bytes_of_store(store)
    parts = {
        "adapters": adapters, "optimizer": state, "replay": replay_bytes, "store": store_bytes,
    }  # fmt: skip
    return {**parts, "total": sum(parts.values())}


def bytes_of_store(store: Any) -> int:
    """A memory as JSON in UTF-8, its history included."""
    return len(json.dumps(store.snapshot(), ensure_ascii=False).encode())


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
