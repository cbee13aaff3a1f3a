"""What a row may look like (TRL's names), brought to one form. No torch.

Text rows: `text`. Conversations: `messages`, or `prompt` + `completion`, each a string or a list of
messages.
"""

from dataclasses import dataclass
from typing import Any

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Conversation:
    """`messages` rows, or `prompt` + `completion` as lists: a chat template renders them."""

    messages: list[Message]
    prompt_length: int
    """Messages that belong to the prompt; those behind it are the completion."""


@dataclass(frozen=True, slots=True)
class Completion:
    """`prompt` + `completion` as plain strings: joined as they are, an end-of-text token behind."""

    prompt: str
    completion: str


class FormatError(ValueError):
    """A row that is not of a known form; the text says what is wrong with it."""


def as_text(fields: dict[str, Any]) -> str:
    """The `text` of a row for objective `lm`."""
    text = fields.get("text")
    if not isinstance(text, str):
        have = ", ".join(map(str, fields)) or "nothing"
        raise FormatError(f"objective lm needs a column 'text' of strings; the row has {have}")
    return text


def as_example(fields: dict[str, Any]) -> Conversation | Completion:
    """The conversation or completion of a row for objective `sft`."""
    if fields.get("messages") is not None:
        messages = _messages(fields["messages"], "messages")
        if not any(m["role"] == "assistant" for m in messages):
            raise FormatError("messages: no turn has role 'assistant', so nothing can be learned")
        last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
        return Conversation(messages[: last + 1], last)
    prompt, completion = fields.get("prompt"), fields.get("completion")
    if prompt is None or completion is None:
        have = ", ".join(map(str, fields)) or "nothing"
        raise FormatError(
            "objective sft needs columns 'messages', or 'prompt' and 'completion'; "
            f"the row has {have} (data.columns renames)"
        )
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion:
            raise FormatError("completion: empty, so nothing can be learned")
        return Completion(prompt, completion)
    before, after = _messages(prompt, "prompt"), _messages(completion, "completion")
    if after[0]["role"] != "assistant":
        raise FormatError(f"completion: first role is {after[0]['role']!r}, not 'assistant'")
    return Conversation([*before, *after], len(before))


def _messages(value: Any, name: str) -> list[Message]:
    if isinstance(value, str) or not isinstance(value, list) or not value:
        raise FormatError(f"{name}: {type(value).__name__}, not a list of messages")
    messages = []
    for index, message in enumerate(value):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise FormatError(f"{name}[{index}]: needs the keys 'role' and 'content'")
        role, content = message["role"], message["content"]
        if not isinstance(role, str) or not isinstance(content, str):
            raise FormatError(f"{name}[{index}]: role and content must be strings")
        messages.append({"role": role, "content": content})
    return messages
