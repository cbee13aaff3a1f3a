"""What a memory manager is shown: the view of its memory and one chunk, in a fresh context.

Two forms: `text`, bare marks for a small model trained from nothing, and `chat`, instructions in
the tokenizer's chat template. Training, evaluation and use all render here.
"""

from collections.abc import Sequence
from typing import Any, Literal

from mnemic.models.memory.store import Memory
from mnemic.models.memory.syntax import Syntax
from mnemic.models.memory.text import defuse, marks_of

Form = Literal["text", "chat"]

_TASK = (
    "You keep a memory for later questions. Read the new text and change the memory: remember what "
    "is new and lasting, update what changed, delete what no longer holds, leave out small talk."
)


def messages(
    syntax: Syntax, store: Memory, view_text: str, chunk: str, errors: Sequence[str] = ()
) -> list[dict[str, str]]:
    """The chat form's prompt."""
    system = f"{_TASK}\n{syntax.explain(store.kinds, core=store.core_tokens > 0)}"
    return [
        {"role": "system", "content": system},
        {"role": "user", "content": _body(view_text, chunk, errors)},
    ]


def text_prompt(view_text: str, chunk: str, errors: Sequence[str] = ()) -> str:
    """The text form's prompt; the operations follow."""
    return f"{_body(view_text, chunk, errors)}\nops:\n"


def _body(view_text: str, chunk: str, errors: Sequence[str]) -> str:
    lines = ["memory:"]
    if view_text:
        lines.append(defuse(view_text))
    if errors:
        lines += ["errors:", *(defuse(error) for error in errors)]
    return "\n".join([*lines, "new:", defuse(chunk)])


def render(
    tokenizer: Any,
    *,
    syntax: Syntax,
    store: Memory,
    view_text: str,
    chunk: str,
    form: Form,
    errors: Sequence[str] = (),
) -> list[int]:
    """Token ids of the prompt. No mark of the tokenizer's gets into it from memory or chunk."""
    marks = marks_of(tokenizer)
    view_text, chunk = defuse(view_text, marks), defuse(chunk, marks)
    errors = [defuse(error, marks) for error in errors]
    if form == "text":
        return list(tokenizer(text_prompt(view_text, chunk, errors)).input_ids)
    return list(
        tokenizer.apply_chat_template(
            messages(syntax, store, view_text, chunk, errors),
            add_generation_prompt=True, tokenize=True, return_dict=False,
            enable_thinking=False,  # Qwen3's name; other templates read no such variable
        )
    )  # fmt: skip
