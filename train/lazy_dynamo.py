"""`torch._dynamo` without its cost for a process that compiles nothing.

transformers takes one class out of a module of that package, and torch's optimizers and checkpoints
ask it to leave a function alone when it compiles. Importing it whole for these takes 2 s and about
100 MiB (torch 2.13), a fifth of what a streamed run holds. So the package is put in place unloaded:
what these need works without it, a function's marks for the compiler wait until there is one, and
the first use of anything else loads it whole, in place: torch.compile, a process group, and also
the import of bitsandbytes (peft imports that where it is installed), which compiles two functions.
"""

import sys
from collections.abc import Callable
from functools import partial
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

NAME = "torch._dynamo"
MASKS = f"{NAME}._trace_wrapped_higher_order_op"
"""What transformers' masks import. It needs nothing else of the package."""

MARKS = ("allow_in_graph", "assume_constant_result")
"""Decorators that tell the compiler about a function and return the function."""


class _Unloaded(ModuleType):
    def __init__(self, folder: Path) -> None:
        super().__init__(NAME)
        self.folder = folder
        self.marked: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        if name in MARKS:
            return partial(self._mark, name)
        if name == "config":  # checkpoints read it; it needs nothing else of the package
            config = module_from_spec(_spec(f"{NAME}.config", self.folder / "config.py"))
            sys.modules[f"{NAME}.config"] = self.config = config
            config.__spec__.loader.exec_module(config)  # pyright: ignore
            return config
        # `__path__` is asked for when another module of the package is imported. Modules there
        # import each other in circles that close only if the package comes first.
        if name.startswith("__") and name != "__path__":
            raise AttributeError(name)
        self._load()
        return getattr(self, name)

    def _mark(self, name: str, function: Any) -> Any:
        self.marked.append((name, function))
        return function

    def _load(self) -> None:
        """Run the package in the place that stood for it."""
        spec, marked = self.__spec__, self.marked
        assert spec is not None and spec.loader is not None
        self.__path__ = [str(self.folder)]
        for own in ("folder", "marked", *STAND_INS):
            delattr(self, own)
        self.__class__ = ModuleType  # pyright: ignore[reportAttributeAccessIssue]
        spec.loader.exec_module(self)
        for name, function in marked:
            getattr(self, name)(function)


class _Masks(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self.__class__ = ModuleType  # pyright: ignore[reportAttributeAccessIssue]
        assert self.__spec__ is not None and self.__spec__.loader is not None
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


def _spec(name: str, path: Path) -> ModuleSpec:
    spec = spec_from_file_location(name, path)
    assert spec is not None
    return spec


def _disable(fn: Any = None, recursive: bool = True, **_: Any) -> Any:
    """torch._dynamo.disable where nothing is compiled: the function itself."""
    return (lambda given: given) if fn is None else fn


def _graph_break(msg: str = "") -> None:
    """torch._dynamo.graph_break where there is no graph."""


class _CompiledModule:
    """What accelerate asks every model to be, or not: there is none yet."""


STAND_INS: dict[str, Any] = {
    "disable": _disable,
    "graph_break": _graph_break,
    "eval_frame": SimpleNamespace(OptimizedModule=_CompiledModule),
}


def put_off_dynamo() -> bool:
    """Put the unloaded package in place, before torch is imported or after; False where it is
    loaded already, or laid out otherwise.
    """
    if NAME in sys.modules:
        return False
    torch = find_spec("torch")
    if torch is None or not torch.submodule_search_locations:
        return False
    folder = Path(torch.submodule_search_locations[0], "_dynamo")
    start, masks = folder / "__init__.py", folder / f"{MASKS.rpartition('.')[2]}.py"
    if not (start.is_file() and masks.is_file() and (folder / "config.py").is_file()):
        return False
    package = _Unloaded(folder)
    spec = _spec(NAME, start)
    vars(package).update(
        __spec__=spec, __loader__=spec.loader, __file__=str(start), __package__=NAME, **STAND_INS
    )
    sys.modules[NAME] = package
    sys.modules[MASKS] = _Masks(MASKS)
    vars(sys.modules[MASKS]).update(__spec__=_spec(MASKS, masks), __file__=str(masks))
    return True


def put_off_as_here() -> Callable[[], object] | None:
    """What a process that plans for this one does first, so that its imports are the same."""
    return put_off_dynamo if isinstance(sys.modules.get(NAME), _Unloaded) else None
