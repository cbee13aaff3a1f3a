"""What `mnemic eval memory` evaluates, loaded: a run folder, an exported model with its
memory.json, or the untrained model of a recipe; and who answers.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mnemic.models.memory.episode import MemoryConfig
from mnemic.train.data.memory.kvstream import KvStream
from mnemic.train.errors import RecipeError, UserError
from mnemic.train.recipe.describe import closest
from mnemic.train.recipe.load import (
    apply_overrides,
    build_recipe,
    load_recipe,
    parse_overrides,
    shipped_recipes,
)
from mnemic.train.recipe.memory import (
    EndpointAnswerer,
    ModelAnswerer,
    RuleAnswerer,
    SelfAnswerer,
)
from mnemic.train.recipe.recipe import Recipe

log = logging.getLogger("mnemic")


@dataclass
class Target:
    """What is evaluated: a loaded model, how it keeps a memory, and what its recipe says of streams
    and answers. `folder`: where answers of an endpoint are kept.
    """

    name: str
    model: Any
    tokenizer: Any
    memory: MemoryConfig
    stream: KvStream
    answerer: Any
    folder: Path


def answerer_of(name: str | None, model: str | None) -> Any:
    """The recipe part of `--answerer`; None where it is not given."""
    url = name is not None and name.startswith(("http://", "https://"))
    if model and not url:
        raise RecipeError("--answerer-model: is for an --answerer that is an http address")
    if name is None:
        return None
    if name == "rule":
        return RuleAnswerer()
    if name == "self":
        return SelfAnswerer()
    if url:
        if not model:
            raise RecipeError(
                "--answerer: an endpoint needs the name of its model; add --answerer-model NAME"
            )
        return EndpointAnswerer(base_url=name, model=model)
    # A name with a slash may be one of the hub's.
    if name == "smollm2-135m" or "/" in name or Path(name).is_dir():
        return ModelAnswerer(path=name)
    known = ("rule", "self", "smollm2-135m")
    raise RecipeError(
        f"--answerer: {name!r} is neither {', '.join(known)}, nor a folder, nor an http address"
        + closest(name, known)
    )


def open_target(name: str, overrides: list[str]) -> Target:
    """Load what is to be evaluated; `UserError` or `RecipeError` where it cannot be."""
    path = Path(name)
    if (path / "recipe.yaml").is_file():
        return _of_run(name, overrides)
    if path.is_dir():
        if (path / "memory.json").is_file():
            return _of_export(path, overrides)
        if (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
            raise UserError(
                f"{name}: has no memory.json, so nothing says how its model keeps a memory; give a "
                "run folder, or a model that mnemic export wrote from a memory run"
            )
        raise UserError(
            f"{name}: neither a run folder (recipe.yaml) nor a model with its memory.json"
        )
    if not path.is_file() and name not in (shipped := shipped_recipes()):
        raise RecipeError(
            f"{name}: no such run folder, model or recipe{closest(name, list(shipped))} "
            "(mnemic recipes ls)"
        )
    recipe, dropped = load_recipe(name, overrides)
    for note in dropped:
        log.warning("note: %s", note)
    memory = _memory(recipe, name)
    from mnemic.train.build import build_model, build_tokenizer

    tokenizer = build_tokenizer(recipe)
    model = build_model(recipe, tokenizer).eval()
    return Target(
        f"{recipe.name}, untrained", placed(model), tokenizer, memory, _stream(recipe),
        _answerer(recipe), _cache(),
    )  # fmt: skip


def _of_run(name: str, overrides: list[str]) -> Target:
    from mnemic.train.export import load_run
    from mnemic.train.folder import open_run

    folder, recipe = open_run(name)
    memory = _memory(recipe, name)
    memory, stream = with_settings(memory, _stream(recipe), overrides)
    newest, final = folder.newest(), folder.final
    gone = newest is None or (newest / "accelerate").is_dir()
    if gone and (final / "memory.json").is_file():
        # Checkpoints were cleared, or are DeepSpeed's: the result is there.
        model, tokenizer = _read_model(final)
    else:
        model, tokenizer, _ = load_run(name)
    return Target(
        recipe.name, placed(model), tokenizer, memory, stream, _answerer(recipe), folder.path
    )


def _of_export(path: Path, overrides: list[str]) -> Target:
    from mnemic.models.memory.manager import read_config

    try:
        memory = read_config(path)
    except ValueError as error:
        raise UserError(str(error)) from None
    memory, stream = with_settings(memory, KvStream(), overrides)
    model, tokenizer = _read_model(path)
    return Target(str(path), model, tokenizer, memory, stream, RuleAnswerer(), _cache())


def _read_model(path: Path) -> tuple[Any, Any]:
    from mnemic.models.load import LoadError
    from mnemic.models.memory.model_reader import load_reader

    try:
        return load_reader(path)
    except LoadError as error:
        raise UserError(str(error)) from error


def with_settings(
    memory: MemoryConfig, stream: KvStream, overrides: list[str]
) -> tuple[MemoryConfig, KvStream]:
    """Both with `--set`, checked as a recipe's sections are. `RecipeError` for any other key: the
    model is trained, so nothing else of its recipe has an effect.
    """
    parsed = parse_overrides(overrides)
    for keys, _ in parsed:
        if not (keys[0] == "memory" or keys[:2] == ["data", "stream"]) or keys[-1] in (
            "memory", "stream",
        ):  # fmt: skip
            raise RecipeError(
                f"--set {'.'.join(keys)}: has no effect on a trained model; "
                "memory.KEY and data.stream.KEY may be set"
            )
    tree: dict[str, Any] = {
        "name": "eval", "model": {"kind": "tiny"}, "objective": {"kind": "sft"},
        "optimizer": {"kind": "adamw", "lr": 1e-3}, "loop": {"steps": 1},
        "memory": dict(vars(memory)), "data": {"kind": "kvstream", "stream": dict(vars(stream))},
    }  # fmt: skip
    apply_overrides(tree, parsed)
    recipe = build_recipe(tree, source="--set" if overrides else "")
    return _memory(recipe, "--set"), _stream(recipe)


def _memory(recipe: Recipe, name: str) -> MemoryConfig:
    if recipe.memory is None:
        raise UserError(f"{name}: its recipe has no memory, so it trains no memory manager")
    return MemoryConfig(**recipe.memory.model_dump())


def _stream(recipe: Recipe) -> KvStream:
    from mnemic.train.data.memory.rows import kv_stream
    from mnemic.train.recipe.data import KvStreamData

    data = recipe.data
    return kv_stream(data.stream) if isinstance(data, KvStreamData) else KvStream()


def _answerer(recipe: Recipe) -> Any:
    return getattr(recipe.objective, "answerer", None) or RuleAnswerer()


def _cache() -> Path:
    from mnemic.models.smollm2 import cache_root

    return cache_root()


def placed(model: Any) -> Any:
    """On the accelerator where there is one; a streamed model stays where it is."""
    import torch

    device = torch.accelerator.current_accelerator(check_available=True)
    if device is None or hasattr(model, "streamed"):
        return model
    return model.to(device)
