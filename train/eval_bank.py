"""What the evaluation of a memory pipeline loads: one base, the experts of one or more folders over
it, and an adapter that is shared by all operations.
"""

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mnemic.models.memory.op_prompts import OPERATIONS
from mnemic.train.errors import RecipeError, UserError

SHARED = "mem_shared"
"""The shared adapter's name in the bank."""


@dataclass(frozen=True)
class Source:
    """Where adapters and their base are: `experts` by operation, `model` (a recipe's section) with
    the seed of its weights, and the folder that holds the tokenizer, if one does.
    """

    experts: dict[str, Path]
    model: dict[str, Any]
    seed: int = 0
    tokenizer: Path | None = None


@dataclass
class BankTarget:
    """A loaded source: `bank` over the base, or the plain base where there is no adapter."""

    bank: Any
    tokenizer: Any
    sources: dict[str, Path] = field(default_factory=dict)

    def adapters(self, names: dict[str, str | None]) -> dict[str, Any]:
        """Settings of `ModelWriter` that give each operation its adapter (None: the base)."""
        return {"adapters": names} if hasattr(self.bank, "operations") else {}

    def bytes(self, names: dict[str, str | None]) -> dict[str, int]:
        """Bytes of the adapter that does each operation."""
        sizes = self.bank.bytes() if hasattr(self.bank, "operations") else {}
        return {op: sizes[name] for op, name in names.items() if name is not None}

    def stamp(self, name: str) -> list[Any]:
        """What tells one state of an adapter's file from another."""
        file = self.sources[name] / "adapter_model.safetensors"
        if not file.is_file():
            return [str(self.sources[name].resolve())]
        return [str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns]


def is_bank(target: str) -> bool:
    """Whether a TARGET is an adapter bank: a folder with one adapter in each subfolder, a run that
    trains one, or a list of them.
    """
    if "," in target and not Path(target).exists():
        return True
    path = Path(target)
    if (path / "recipe.yaml").is_file():
        return _run_kind(path) == "bank"
    return (path / "bank.json").is_file() or bool(_experts(path))


def find(target: str, base: str | None = None) -> Source:
    """The source of a TARGET: folders, later ones adding operations. `base`: a model that takes the
    place of the one that the folders name. `UserError` or `RecipeError` for what is not there.
    """
    names = [target] if Path(target).exists() else [part.strip() for part in target.split(",")]
    experts: dict[str, Path] = {}
    models: list[tuple[str, dict[str, Any], int, Path | None]] = []
    for name in filter(None, names):
        folder, model, seed = _open(name)
        for operation, path in _experts(folder).items():
            if operation in experts:
                raise UserError(
                    f"{name}: {operation} is in {experts[operation].parent} too; leave one out"
                )
            experts[operation] = path
        kept = folder if (folder / "tokenizer_config.json").is_file() else None
        if model is not None:
            models.append((name, model, seed, kept))
    if not models and base is None:
        raise UserError(
            f"{target}: no bank.json says which model is the base; add --base MODEL (smollm2-135m, "
            "a folder or a hub name)"
        )
    for name, model, seed, _ in models[1:]:
        if base is None and (model, seed) != models[0][1:3]:
            raise UserError(
                f"{name}: was trained over another base than {models[0][0]} ({_named(model)}, not "
                f"{_named(models[0][1])}); experts of one pipeline share a base"
            )
    model, seed, kept = models[0][1:] if models else ({}, 0, None)
    if base is not None:
        from mnemic.train.recipe.model import PretrainedModel, SmolLM2

        part = SmolLM2() if base == "smollm2-135m" else PretrainedModel(path=base)
        model, kept = part.model_dump(mode="json"), None
    return Source(experts, model, seed, kept)


def find_shared(name: str, source: Source) -> Path:
    """The PEFT folder of `shared=NAME`: a run, its result, or a folder with a single adapter."""
    path = Path(name)
    if (path / "recipe.yaml").is_file():
        from mnemic.train.folder import open_run

        folder, recipe = open_run(name)
        model = recipe.model.model_dump(mode="json")
        # Weights held in another type are the same base, rounded.
        if model | {"dtype": None} != source.model | {"dtype": None}:
            raise UserError(
                f"--systems shared={name}: was trained over {_named(model)} and the target over "
                f"{_named(source.model)}, or with other settings of `model`; they need one base"
            )
        path = folder.final
    if (path / "adapter_config.json").is_file():
        return path
    found = _experts(path)
    if len(found) != 1:
        raise UserError(
            f"--systems shared={name}: needs the folder of one PEFT adapter (adapter_config.json), "
            f"and holds {', '.join(found) or 'none'}"
        )
    return next(iter(found.values()))


def need(source: Source, operations: tuple[str, ...] = OPERATIONS) -> None:
    """`RecipeError` unless there is an expert for each operation."""
    missing = [op for op in operations if op not in source.experts]
    if missing:
        have = ", ".join(source.experts) or "none"
        raise RecipeError(
            f"--systems experts: the target has no {', '.join(missing)}, it has {have}; add the "
            "folder that has it (TARGET may be FOLDER,FOLDER), or leave experts out of --systems"
        )


def load(source: Source, shared: Path | None = None) -> BankTarget:
    """Base, tokenizer and all adapters, on the accelerator where there is one."""
    from mnemic.models.load import LoadError, load_tokenizer
    from mnemic.train.build import build_model, build_tokenizer
    from mnemic.train.eval_target import placed
    from mnemic.train.recipe.load import build_recipe

    recipe = build_recipe(
        {
            "name": "eval", "model": source.model, "objective": {"kind": "sft"},
            "optimizer": {"kind": "adamw", "lr": 1e-3}, "data": {"kind": "facts"},
            "loop": {"steps": 1, "seed": source.seed},
        },
        source="the target's model",
    )  # fmt: skip
    try:
        kept = source.tokenizer
        tokenizer = build_tokenizer(recipe) if kept is None else load_tokenizer(str(kept))
    except LoadError as error:
        raise UserError(str(error)) from None
    base = placed(build_model(recipe, tokenizer).eval())
    paths = {op: path for op, path in source.experts.items() if op in OPERATIONS}
    if shared is not None:
        paths[SHARED] = shared
    return BankTarget(_bank(base, paths) if paths else base, tokenizer, paths)


def _bank(base: Any, paths: dict[str, Path]) -> Any:
    """A bank of adapters from several folders, by links to them under one."""
    from mnemic.models.adapters import AdapterBank

    with tempfile.TemporaryDirectory(prefix="mnemic-bank-") as name:
        for operation, path in paths.items():
            (Path(name) / operation).symlink_to(path.resolve(), target_is_directory=True)
        try:
            return AdapterBank.load(base, name, list(paths))
        except ValueError as error:
            text = str(error)
            for operation, path in paths.items():
                text = text.replace(str(Path(name) / operation), str(path))
            raise UserError(text) from None


def _open(name: str) -> tuple[Path, dict[str, Any] | None, int]:
    """(folder of the adapters, the base's section, the seed of its weights)."""
    path = Path(name)
    if (path / "recipe.yaml").is_file():
        from mnemic.train.folder import open_run

        run, recipe = open_run(name)
        if not _experts(run.final):
            raise UserError(
                f"{name}: has no result yet ({run.final} holds no adapter); finish the run, or "
                "mnemic export one of its checkpoints"
            )
        return run.final, recipe.model.model_dump(mode="json"), recipe.loop.seed
    if not _experts(path):
        raise UserError(
            f"{name}: holds no adapter bank; needs a folder with OPERATION/adapter_config.json, or "
            "a run folder of adapters.kind=bank"
        )
    if path.name == "final" and (path.parent / "recipe.yaml").is_file():
        return path, *_open(str(path.parent))[1:]
    file = path / "bank.json"
    if not file.is_file():
        return path, None, 0
    try:
        raw = json.loads(file.read_text("utf-8"))
        model, seed = raw.get("model"), raw.get("seed", 0)
        if not isinstance(model, dict | None) or type(seed) is not int:
            raise TypeError
    except (ValueError, AttributeError, TypeError):
        raise UserError(
            f'{file}: needs {{"model": {{...}}}}, the section of a recipe; mend it, or take it '
            "away and give --base MODEL"
        ) from None
    return path, model, seed


def _run_kind(path: Path) -> str:
    from mnemic.train.folder import open_run

    return open_run(str(path))[1].adapters.kind


def _experts(folder: Path) -> dict[str, Path]:
    return {
        file.parent.name: file.parent
        for file in sorted(folder.glob("*/adapter_config.json"))
        # A run's result is one adapter in final/, no operation.
        if file.parent.name != "final" and not file.parent.name.startswith(".")
    }


def _named(model: dict[str, Any]) -> str:
    return str(model.get("path") or model.get("kind"))
