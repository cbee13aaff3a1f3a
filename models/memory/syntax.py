"""How operations are written: compact lines for small models, tool calls for models trained on
them.

Both parsers are tolerant: each call stands alone, one that cannot be read becomes an error beside
the others and never voids them. They raise nothing, whatever the text.
"""

import json
import re
from collections.abc import Sequence
from typing import Any, Literal, Protocol

from mnemic.models.memory.operations import (
    Applied,
    CoreRewrite,
    Delete,
    Insert,
    Operation,
    Update,
    validate,
)
from mnemic.models.memory.store import OperationError

MAX_CALLS = 64
"""Calls of one turn that are read; the rest is one error."""

SyntaxKind = Literal["lines", "tools"]


class Syntax(Protocol):
    def write(self, operations: Sequence[Operation]) -> str: ...
    def parse(self, text: str, *, cut: bool = False) -> list[Applied]: ...
    def explain(self, kinds: tuple[str, ...], *, core: bool) -> str: ...


class Lines:
    """One operation a line: `+ text` inserts (`+episodic@2024-05-01 text` with kind and time, `_`
    for a space in the time), `= m3 text` updates, `- m3` deletes, `# text` rewrites the core,
    `noop` does nothing.
    """

    def write(self, operations: Sequence[Operation]) -> str:
        return "\n".join(_line(op) for op in operations)

    def parse(self, text: str, *, cut: bool = False) -> list[Applied]:
        """`cut`: generation ran into its limit, so the last line is not whole."""
        lines = [line.strip() for line in text.splitlines()]
        lines = [line for line in lines if line]
        found = [_read_line(line) for line in lines[:MAX_CALLS]]
        if len(lines) > MAX_CALLS:
            found.append(_too_many(len(lines)))
        elif cut and found:
            found[-1] = Applied(None, None, "cut off at the token limit", lines[-1][:200])
        return found

    def explain(self, kinds: tuple[str, ...], *, core: bool) -> str:
        rows = []
        if kinds:
            other = f" (+{kinds[1]}@DATE text for kind {kinds[1]})" if len(kinds) > 1 else ""
            rows += [f"+ text: remember{other}", "= m3 text: replace m3", "- m3: delete m3"]
        if core:
            rows.append("# text: rewrite the core text")
        return "\n".join(["Answer with one operation a line:", *rows, "noop: nothing to do"])


def _line(op: Operation) -> str:
    # Texts in one line, as the store keeps them: a line break would begin another operation.
    if isinstance(op, Insert):
        time = "_".join((op.time or "").replace("%", "%25").replace("_", "%5F").split())
        return f"+{op.kind or ''}{'@' * bool(time)}{time} {_flat(op.content)}"
    if isinstance(op, Update):
        return f"= {op.id} {_flat(op.content)}"
    if isinstance(op, Delete):
        return f"- {op.id}"
    if isinstance(op, CoreRewrite):
        return f"# {_flat(op.content)}"
    return "noop"


def _flat(text: str) -> str:
    return " ".join(text.split())


_TAG = re.compile(r"\+((?:[^\W\d][\w-]*)?)(?:@(\S+))?\s+(.*)", re.DOTALL)
_CHANGE = re.compile(r"=\s*(\S+)\s+(.*)", re.DOTALL)


def _read_line(line: str) -> Applied:
    raw = line[:200]
    try:
        if line == "noop":
            return Applied(validate("noop", {}), None, None, raw)
        if line[0] == "#":
            return Applied(validate("core_rewrite", {"content": line[1:].strip()}), None, None, raw)
        if line[0] == "-":
            return Applied(validate("delete", {"id": line[1:].strip()[:64]}), None, None, raw)
        if match := _TAG.fullmatch(line):
            kind, time, content = match.groups()
            arguments: dict[str, Any] = {"content": content}
            if kind:
                arguments["kind"] = kind
            if time:
                time = time.replace("_", " ").replace("%5F", "_").replace("%25", "%")
                arguments["time"] = time
            return Applied(validate("insert", arguments), None, None, raw)
        if match := _CHANGE.fullmatch(line):
            id, content = match.groups()
            return Applied(validate("update", {"id": id[:64], "content": content}), None, None, raw)
        raise OperationError("not an operation: a line begins with +, =, -, # or is noop")
    except OperationError as error:
        return Applied(None, None, str(error), raw)


_BLOCK = re.compile(r"<tool_call>(.*?)(</tool_call>|(?=<tool_call>)|\Z)", re.DOTALL)


class ToolCalls:
    """Hermes blocks, as Qwen's and many other chat templates have them:
    `<tool_call>{"name": "insert", "arguments": {"content": "..."}}</tool_call>`.
    """

    def write(self, operations: Sequence[Operation]) -> str:
        return "\n".join(
            f"<tool_call>{json.dumps(_as_call(op), ensure_ascii=False)}</tool_call>"
            for op in operations
        )

    def parse(self, text: str, *, cut: bool = False) -> list[Applied]:
        found: list[Applied] = []
        blocks = list(_BLOCK.finditer(text))
        for match in blocks[:MAX_CALLS]:
            closed = match[2] == "</tool_call>"
            found.append(_read_call(match[1].strip(), closed))
        if len(blocks) > MAX_CALLS:
            found.append(_too_many(len(blocks)))
        if not blocks and text.strip():
            found.append(Applied(None, None, "no <tool_call> block in the answer", text[:200]))
        return found

    def explain(self, kinds: tuple[str, ...], *, core: bool) -> str:
        from mnemic.models.memory.operations import schemas

        tools = "\n".join(json.dumps(s["function"]) for s in schemas(kinds, core=core))
        return (
            f"Tools:\n{tools}\nAnswer with one or more "
            '<tool_call>{"name": ..., "arguments": {...}}</tool_call>.'
        )


def _as_call(op: Operation) -> dict[str, Any]:
    arguments = op.model_dump(exclude_none=True)
    return {"name": arguments.pop("name"), "arguments": arguments}


def _read_call(body: str, closed: bool) -> Applied:
    raw = body[:200]
    try:
        if not closed:
            raise OperationError("the <tool_call> block is not closed")
        try:
            call = json.loads(body, parse_constant=_refuse, object_pairs_hook=_once)
        except (ValueError, RecursionError):
            raise OperationError("the <tool_call> block holds no valid JSON") from None
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise OperationError('a call is {"name": ..., "arguments": {...}}')
        extra = set(call) - {"name", "arguments"}
        if extra:
            raise OperationError(f"unknown key {min(map(str, extra))[:20]!r} beside the arguments")
        return Applied(validate(call["name"], call.get("arguments", {})), None, None, raw)
    except OperationError as error:
        return Applied(None, None, str(error), raw)


def _refuse(name: str) -> None:
    raise ValueError(name)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key twice: which one was meant?")
    return found


def _too_many(count: int) -> Applied:
    return Applied(None, None, f"{count} calls in one turn; the first {MAX_CALLS} were read", "")


def make_syntax(kind: SyntaxKind) -> Syntax:
    return Lines() if kind == "lines" else ToolCalls()
