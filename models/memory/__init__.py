"""Memory for language models: what is kept (stores), who writes it (the manager), who answers from
it (readers).

Names are imported when first used: importing the package imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnemic.models.memory.answer import Answerer, Ask
    from mnemic.models.memory.endpoint import Endpoint, EndpointError
    from mnemic.models.memory.endpoint_reader import EndpointReader
    from mnemic.models.memory.episode import MemoryConfig, MemoryEpisode
    from mnemic.models.memory.manager import MemoryManager
    from mnemic.models.memory.model_reader import ModelReader, SelfReader
    from mnemic.models.memory.pipeline import MemoryPipeline
    from mnemic.models.memory.rule_reader import RuleReader
    from mnemic.models.memory.sqlite import SqliteMemory, open_store
    from mnemic.models.memory.store import Change, Entry, Memory, OperationError
    from mnemic.models.memory.stores import make_store

__all__ = [
    "Answerer", "Ask", "Change", "Endpoint", "EndpointError", "EndpointReader", "Entry", "Memory",
    "MemoryConfig", "MemoryEpisode", "MemoryManager", "MemoryPipeline", "ModelReader",
    "OperationError", "RuleReader", "SelfReader", "SqliteMemory", "make_store", "open_store",
]  # fmt: skip

_HOMES = {
    "answer": ("Answerer", "Ask"),
    "endpoint": ("Endpoint", "EndpointError"),
    "endpoint_reader": ("EndpointReader",),
    "episode": ("MemoryConfig", "MemoryEpisode"),
    "manager": ("MemoryManager",),
    "model_reader": ("ModelReader", "SelfReader"),
    "pipeline": ("MemoryPipeline",),
    "rule_reader": ("RuleReader",),
    "sqlite": ("SqliteMemory", "open_store"),
    "store": ("Change", "Entry", "Memory", "OperationError"),
    "stores": ("make_store",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
