"""docs/reference-api.md out of the source's public docstrings. The source is parsed, not imported,
so that the page does not depend on a version of torch, and is made in a moment.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

from reference_recipe import anchor, prose

ROOT = Path(__file__).parent.parent
WIDTH = 150
HEAD = """\
The classes and functions that programs beside mnemic use, written by
`python scripts/reference.py --write` from their docstrings. Shapes stand in parentheses: B rows,
T or S tokens, H the hidden size, N trained tokens. Names with a leading underscore, and modules not
named here, may change without notice.
"""

# Title, what it is for, and the modules and names as programs import them.
SECTIONS: list[tuple[str, str, dict[str, str]]] = [
    (
        "Recipes and runs",
        "What `mnemic train` and `mnemic export` do, in a program.",
        {
            "mnemic.train.recipe.load": "load_recipe build_recipe parse_overrides dump_recipe "
            "shipped_recipes",
            "mnemic.train.run": "run",
            "mnemic.train.export": "load_run export_run average_checkpoints",
            "mnemic.train.errors": "UserError RecipeError",
            "mnemic.train.callbacks.wandb": "offline_records",
        },
    ),
    (
        "The trainer",
        "One loop; what differs between methods is given to it.",
        {
            "mnemic.train.trainer": "Trainer",
            "mnemic.train.objectives.base": "Objective TokenBatch",
            "mnemic.train.update": "Update PlainUpdate",
            "mnemic.train.in_backward": "InBackwardUpdate",
            "mnemic.train.callbacks.base": "Callback",
        },
    ),
    (
        "Models",
        "Loaded, or made on the spot; and what they write.",
        {
            "mnemic.models.load": "load_causal_lm load_tokenizer LoadError",
            "mnemic.models.tiny": "tiny_llama byte_tokenizer bpe_tokenizer",
            "mnemic.models.generation": "generate",
        },
    ),
    (
        "Steps",
        "`mnemic.optim` needs torch only; `mnemic.train.hf` is for the HF Trainer and TRL.",
        {
            "mnemic.optim.apollo": "Apollo ApolloMini",
            "mnemic.optim.select": "apollo_groups roles state_bytes SelectionError",
            "mnemic.optim.groups": "decay_groups",
            "mnemic.optim.int8": "Int8Weight",
            "mnemic.train.optimizers": "build_optimizer",
            "mnemic.train.hf": "optimizer_cls_and_kwargs optimizers",
        },
    ),
    (
        "Long rows",
        "`TokenSparsity` drops tokens; the others are exact, to round-off.",
        {
            "mnemic.models.tokens.sparsity": "TokenSparsity",
            "mnemic.models.tokens.config": "TokensConfig",
            "mnemic.models.exact.stream": "stream_layers",
            "mnemic.models.exact.tiles": "tile_mlps",
            "mnemic.models.exact.loss": "token_losses",
            "mnemic.models.exact.divergence": "chunked_divergence Divergence",
        },
    ),
    (
        "LoRA",
        "One adapter, or a bank of experts over one base.",
        {
            "mnemic.models.adapters": "AdapterBank",
            "mnemic.models.adapter_rules": "Expert",
            "mnemic.models.lora": "add_lora adapters_off",
        },
    ),
    (
        "Memory of language models",
        "What is kept, who writes it, who answers from it.",
        {
            "mnemic.models.memory": "MemoryManager MemoryPipeline make_store open_store Memory "
            "Entry Change OperationError MemoryConfig MemoryEpisode Answerer Ask ModelReader "
            "SelfReader EndpointReader RuleReader Endpoint EndpointError",
            "mnemic.models.memory.pipeline": "Retained",
            "mnemic.models.memory.retrieve": "DenseIndex Hybrid",
        },
    ),
]
MARKS = {
    "classmethod": "class method", "staticmethod": "static method",
    "contextmanager": "context manager",
}  # fmt: skip
Definition = ast.ClassDef | ast.FunctionDef


def source_of(module: str, name: str) -> Definition:
    """Where a name of a module, or of a package that gives it on, is defined."""
    path = ROOT.joinpath(*module.split(".")[1:])
    for file in (
        [path.with_suffix(".py")] if path.with_suffix(".py").exists() else path.glob("*.py")
    ):
        for node in ast.parse(file.read_text("utf-8")).body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name:
                return node
    raise ValueError(f"scripts/reference_api.py: {module} has no {name}; change SECTIONS")


def doc(node: Definition) -> str:
    return ast.get_docstring(node) or ""


def decorators(node: Definition) -> set[str]:
    return {ast.unparse(d).split("(")[0] for d in node.decorator_list}


def parameters(arguments: ast.arguments, method: bool) -> Iterator[str]:
    """Each parameter as the source has it; `self` and `cls` aside."""
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(plain) - len(arguments.defaults)) + list(arguments.defaults)
    for i, (arg, value) in enumerate(zip(plain, defaults, strict=True)):
        if not (method and i == 0):
            yield _one(arg, value)
        if arguments.posonlyargs and i + 1 == len(arguments.posonlyargs):
            yield "/"
    if arguments.vararg:
        yield "*" + ast.unparse(arguments.vararg)
    elif arguments.kwonlyargs:
        yield "*"
    for arg, value in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield _one(arg, value)
    if arguments.kwarg:
        yield "**" + ast.unparse(arguments.kwarg)


def annotation(node: ast.expr) -> str:
    """A type; one that is quoted, since it is defined further down, without its quotes."""
    return node.value if isinstance(node, ast.Constant) and node.value else ast.unparse(node)


def _one(arg: ast.arg, value: ast.expr | None) -> str:
    text = f"{arg.arg}: {annotation(arg.annotation)}" if arg.annotation else arg.arg
    if value is None:
        return text
    return f"{text} = {ast.unparse(value)}" if arg.annotation else f"{text}={ast.unparse(value)}"


def call(name: str, given: list[str], result: str = "") -> str:
    """A signature, on one line where it fits."""
    line = f"{name}({', '.join(given)}){result}"
    if len(line) <= 100:
        return line
    return f"{name}(\n" + "".join(f"    {text},\n" for text in given) + f"){result}"


def function(node: ast.FunctionDef, *, method: bool = False) -> str:
    result = f" -> {annotation(node.returns)}" if node.returns else ""
    own = method and "staticmethod" not in decorators(node)
    return call(node.name, list(parameters(node.args, own)), result)


def constructor(node: ast.ClassDef) -> str:
    """Of `__init__`, or of a dataclass's fields; a class without either is there by its name."""
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            return call(node.name, list(parameters(item.args, True)))
    if "dataclass" in decorators(node):
        fields = [i for i in node.body if isinstance(i, ast.AnnAssign)]
        shown = [f for f in fields if not ast.unparse(f.target).startswith("_")]
        return call(node.name, [ast.unparse(f) for f in shown])
    bases = [ast.unparse(base) for base in node.bases]
    return f"class {node.name}" + (f"({', '.join(bases)})" if bases else "")


def methods(node: ast.ClassDef) -> Iterator[str]:
    """A line for each public method with a docstring; the rest override torch's or a base's."""
    for item in node.body:
        if not isinstance(item, ast.FunctionDef) or item.name.startswith("_") or not doc(item):
            continue
        marks = decorators(item)
        what = item.name if "property" in marks else " ".join(function(item, method=True).split())
        what = what.replace("( ", "(").replace(", )", ")")
        kind = "".join(f" ({MARKS[mark]})" for mark in sorted(marks & MARKS.keys()))
        yield wrapped(f"-\0`{what}`{kind}: {prose(doc(item))}", "  ")


def wrapped(text: str, indent: str = "") -> str:
    """At `WIDTH` columns; code spans are not cut."""
    held = re.sub(r"`[^`]*`", lambda span: span[0].replace(" ", "\0"), text)
    lines = textwrap.wrap(
        held, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines).replace("\0", " ")


def paragraphs(text: str) -> Iterator[str]:
    """A docstring's, wrapped; an indented one is code."""
    for part in inspect.cleandoc(text).split("\n\n"):
        if part.startswith("    "):
            yield f"```py\n{textwrap.dedent(part)}\n```\n"
        else:
            yield wrapped(prose(part)) + "\n"


def page() -> str:
    """The whole page; ValueError for a name that is not there, or says nothing of itself."""
    parts = [f"# Python reference\n\n{wrapped(HEAD)}\n"]
    for title, what, modules in SECTIONS:
        every = ", ".join(f"[{n}](#{anchor(n)})" for ns in modules.values() for n in ns.split())
        parts += [f"## {title}\n", wrapped(f"{what} {every}.") + "\n"]
        for module, names in modules.items():
            for name in names.split():
                node = source_of(module, name)
                if not doc(node):
                    raise ValueError(f"{module}.{name} has no docstring")
                text = constructor(node) if isinstance(node, ast.ClassDef) else function(node)
                parts.append(f"### {name}\n\n```py\nfrom {module} import {name}\n\n{text}\n```\n")
                marks = decorators(node) & MARKS.keys()
                parts += [f"A {MARKS[mark]}.\n" for mark in sorted(marks)]
                parts += paragraphs(doc(node))
                if isinstance(node, ast.ClassDef) and (found := list(methods(node))):
                    parts.append("\n".join(found) + "\n")
    return "\n".join(parts)
