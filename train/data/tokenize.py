"""Text and conversations to token ids and labels.

A label is the token itself where it is learned and `IGNORE` elsewhere; the shift by one is the
loss's business. Prompt and completion are tokenised the way TRL's SFTTrainer does, so the same rows
give the same loss.
"""

from dataclasses import dataclass
from typing import Any

from mnemic.train.data.formats import Completion, Conversation, FormatError, Message

IGNORE = -100


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised row. `lengths` has one entry, or one for each row joined by packing."""

    input_ids: list[int]
    labels: list[int]
    lengths: tuple[int, ...]
    source_length: int
    """Tokens before any cut."""
    operation: str | None = None
    """Which expert of an adapter bank it is for."""

    @property
    def num_targets(self) -> int:
        """Tokens whose prediction counts: labels behind the first token of each joined row."""
        return sum(label != IGNORE for label in self.labels)


def render(tokenizer: Any, messages: list[Message], *, generation: bool = False) -> list[int]:
    """Token ids of the chat template."""
    return list(
        tokenizer.apply_chat_template(
            messages, add_generation_prompt=generation, tokenize=True, return_dict=False
        )
    )


def with_system(messages: list[Message], system: str | None) -> list[Message]:
    """Put `system` first in a conversation that brings no system message."""
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


class SftTokenizer:
    """Rows of objective `sft` to `Example`s.

    `loss_on`: `completion` learns everything behind the prompt, `assistant` every assistant turn,
    `all` every token. Raises `FormatError` for a row that cannot be used.
    """

    def __init__(
        self, tokenizer: Any, *, loss_on: str, max_length: int, truncate: bool, system: str | None
    ) -> None:
        self.tokenizer, self.loss_on, self.system = tokenizer, loss_on, system
        self.max_length, self.truncate = max_length, truncate

    def __call__(self, row: Conversation | Completion) -> Example:
        if isinstance(row, Completion):
            ids, labels = self._completion(row)
        else:
            ids, labels = self._conversation(row)
        length = len(ids)
        if length > self.max_length:
            if not self.truncate:
                raise FormatError(
                    f"{length} tokens, longer than objective.max_length={self.max_length}"
                )
            ids, labels = ids[: self.max_length], labels[: self.max_length]
        # The first token of a row has no predecessor: nothing predicts it.
        labels = [IGNORE, *labels[1:]]
        if all(label == IGNORE for label in labels):
            raise FormatError(
                f"no trainable token within objective.max_length={self.max_length} "
                f"(the row has {length} tokens)"
            )
        return Example(ids, labels, (len(ids),), length)

    def prompt(self, row: Conversation | Completion) -> list[int]:
        """Ids that generation starts from."""
        if isinstance(row, Completion):
            return self.tokenizer(row.prompt).input_ids
        messages = with_system(row.messages, self.system)
        return render(self.tokenizer, messages[: self._prompt_length(row)], generation=True)

    @staticmethod
    def reference(row: Conversation | Completion) -> str:
        """Text a generation is compared with."""
        if isinstance(row, Completion):
            return row.completion
        return row.messages[row.prompt_length]["content"]

    def _prompt_length(self, row: Conversation) -> int:
        return row.prompt_length + len(with_system(row.messages, self.system)) - len(row.messages)

    def _completion(self, row: Completion) -> tuple[list[int], list[int]]:
        text = row.prompt + row.completion
        eos = self.tokenizer.eos_token
        if eos and not text.endswith(eos):
            text += eos
        prompt = self.tokenizer(row.prompt).input_ids
        ids = self.tokenizer(text).input_ids
        if self.loss_on == "all":
            return ids, list(ids)
        # A tokenizer that closes every text with a token of its own closes the prompt with it too.
        start = len(prompt)
        while start and ids[:start] != prompt[:start]:
            start -= 1
        return ids, [IGNORE] * start + ids[start:]

    def _conversation(self, row: Conversation) -> tuple[list[int], list[int]]:
        if not getattr(self.tokenizer, "chat_template", None):
            raise FormatError(
                "a conversation, but the model's tokenizer has no chat template; "
                "use prompt and completion as plain strings, or a chat model"
            )
        messages = with_system(row.messages, self.system)
        ids = render(self.tokenizer, messages)
        if self.loss_on == "all":
            return ids, list(ids)
        first = self._prompt_length(row)
        if self.loss_on == "completion":
            start = len(self._prefix(messages, first, ids))
            return ids, [IGNORE] * start + ids[start:]
        labels = [IGNORE] * len(ids)
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                start = len(self._prefix(messages, index, ids))
                turn = render(self.tokenizer, messages[: index + 1])
                if ids[: len(turn)] != turn:
                    raise FormatError(_UNSTABLE)
                labels[start : len(turn)] = ids[start : len(turn)]
        return ids, labels

    def _prefix(self, messages: list[Message], count: int, ids: list[int]) -> list[int]:
        """Ids before the turn `messages[count]`, which the whole rendering must begin with."""
        prefix = render(self.tokenizer, messages[:count], generation=True)
        if ids[: len(prefix)] != prefix:
            raise FormatError(_UNSTABLE)
        return prefix


_UNSTABLE = (
    "the chat template renders earlier turns differently once later ones follow, so the learned "
    "turn cannot be located; set objective.loss_on=all, or use prompt and completion strings"
)


def lm_ids(tokenizer: Any, text: str, *, last: bool) -> list[int]:
    """Ids of a piece of text without special tokens, an end-of-text token behind a
    document's end.
    """
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    if last and tokenizer.eos_token_id is not None:
        ids.append(tokenizer.eos_token_id)
    return ids
