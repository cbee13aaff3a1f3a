"""What a model may do to a memory, as strict schemas; whatever it emits passes here first.

A model's output is untrusted text: types are not coerced, unknown arguments are refused, control
characters and the marks of chat templates never reach the store (they would be read as structure
when the memory is shown again).
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from mnemic.models.memory.store import MemoryStore, OperationError

MAX_CHARACTERS = 8192
# \x85 is a line break: the store makes spaces of those.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")
# ChatML and Llama 3, DeepSeek (full-width bars), Gemma, Llama 2 and Mistral, sentencepiece.
_MARK = re.compile(
    r"<[|\uff5c].{0,64}?[|\uff5c]>|\[/?INST\]|<</?SYS>>"
    r"|</?(?:tool_call|tool_response|think|im_start|im_end|start_of_turn|end_of_turn"
    r"|s|bos|eos|pad|unk)>",
    re.IGNORECASE,
)


def _clean(text: str) -> str:
    if _CONTROL.search(text):
        raise ValueError("holds control characters")
    # As the store will hold it: a line break must not hide a mark.
    if _MARK.search(" ".join(text.split())):
        raise ValueError("holds a mark of the chat template")
    return text


Text = Annotated[str, Field(min_length=1, max_length=MAX_CHARACTERS), AfterValidator(_clean)]
Id = Annotated[str, Field(pattern=r"^m[0-9]{1,9}$")]


class _Operation(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Insert(_Operation):
    """Remember something new."""

    name: Literal["insert"] = "insert"
    content: Text
    kind: Annotated[str, Field(max_length=32)] | None = None
    time: Annotated[str, Field(max_length=64), AfterValidator(_clean)] | None = None


class Update(_Operation):
    """Put new content in the place of an entry's."""

    name: Literal["update"] = "update"
    id: Id
    content: Text


class Delete(_Operation):
    """Remove an entry that no longer holds."""

    name: Literal["delete"] = "delete"
    id: Id


class CoreRewrite(_Operation):
    """Replace the whole core text."""

    name: Literal["core_rewrite"] = "core_rewrite"
    content: Annotated[str, Field(max_length=MAX_CHARACTERS), AfterValidator(_clean)]


class Noop(_Operation):
    """Nothing here is worth remembering."""

    name: Literal["noop"] = "noop"


Operation = Insert | Update | Delete | CoreRewrite | Noop
OPERATIONS: dict[str, type[_Operation]] = {
    "insert": Insert, "update": Update, "delete": Delete, "core_rewrite": CoreRewrite,
    "noop": Noop,
}  # fmt: skip


def validate(name: str, arguments: Any) -> Operation:
    """The operation, or `OperationError` with one sentence for the model."""
    kind = OPERATIONS.get(name)
    if kind is None:
        raise OperationError(f"unknown operation {name[:20]!r}; there are {', '.join(OPERATIONS)}")
    if not isinstance(arguments, dict):
        raise OperationError(f"{name}: arguments must be an object")
    if "name" in arguments:
        raise OperationError(f"{name}: unknown argument 'name'")
    try:
        return kind.model_validate(arguments)  # type: ignore[return-value]
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        key = str(first["loc"][0]) if first["loc"] else "arguments"
        # The key may be the model's own: quoted, since a line break in it must not reach a prompt.
        where = key if key in kind.model_fields else repr(key[:20])
        raise OperationError(f"{name}: {where}: {first['msg']}") from None


def schemas(kinds: tuple[str, ...], *, core: bool) -> list[dict[str, Any]]:
    """JSON schemas of the operations a memory of these kinds takes, in the form of tool lists."""
    found = []
    for name, kind in OPERATIONS.items():
        if (name == "core_rewrite" and not core) or (
            name in ("insert", "update", "delete") and not kinds
        ):
            continue
        parameters = kind.model_json_schema()
        parameters["properties"].pop("name")
        if name == "insert":
            if len(kinds) > 1:
                parameters["properties"]["kind"] = {"enum": list(kinds), "type": "string"}
            else:
                parameters["properties"].pop("kind")
        parameters.pop("title", None)
        description = parameters.pop("description", "")
        found.append({
            "type": "function",
            "function": {"name": name, "description": description, "parameters": parameters},
        })  # fmt: skip
    return found


@dataclass(frozen=True, slots=True)
class Applied:
    """What became of one call: the operation (None if it could not be read), the id it touched, and
    the error that was fed back, or None.
    """

    operation: Operation | None
    id: str | None
    error: str | None
    raw: str

    @property
    def ok(self) -> bool:
        return self.error is None


def apply(
    store: MemoryStore, operation: Operation, *, visible: frozenset[str] | None = None
) -> str | None:
    """Carry out one operation; returns the id it touched. `OperationError` where it cannot be, and
    then nothing is changed. With `visible`, only ids shown to the model may be changed: another one
    is a guess.
    """
    if isinstance(operation, (Update, Delete)) and visible is not None:
        known = operation.id in visible
        if not known:
            raise OperationError(f"there is no {operation.id!r} in view")
    if isinstance(operation, Insert):
        return store.insert(operation.content, operation.kind, operation.time).id
    if isinstance(operation, Update):
        return store.update(operation.id, operation.content).id
    if isinstance(operation, Delete):
        return store.delete(operation.id).id
    if isinstance(operation, CoreRewrite):
        store.rewrite_core(operation.content)
        return "core"
    return None
