"""Who carries out the operations of the pipeline: an adapter bank, each operation by its own
expert, or any chat model as it is.

One protocol, so that a teacher behind an endpoint, or gold, can stand in the same place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mnemic.models.memory.op_prompts import EXTRACT, GENERATE, OPERATIONS, UPDATE, Messages
from mnemic.models.memory.text import defuse, marks_of


@dataclass(frozen=True, slots=True)
class Reply:
    """`cut`: ran into the token limit. Tokens are the writer's own; 0 where it cannot tell."""

    text: str
    cut: bool = False
    prompt_tokens: int = 0
    new_tokens: int = 0


class Writer(Protocol):
    def write(self, operation: str, conversations: Sequence[Messages]) -> list[Reply]:
        """One reply to each, in their order."""
        ...

    def room(self, operation: str, messages: Messages) -> int | None:
        """Tokens that could still be added to the prompt; negative: it is too long; None: no
        limit is known.
        """
        ...


class ModelWriter:
    """Greedy replies of `model`: an AdapterBank or a causal LM (then all operations by it, with the
    adapters that are active). `adapters` maps operations to other experts of the bank (None: the
    base), such as one shared by all.

    Raises:
        ValueError: the bank has no expert for an operation.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        adapters: dict[str, str | None] | None = None,
        max_new_tokens: dict[str, int] | None = None,
        batch_size: int = 16,
    ) -> None:
        self.bank = model if hasattr(model, "parameters_of") else None
        self.model = model.model if self.bank is not None else model
        self.tokenizer, self.batch_size = tokenizer, batch_size
        self.adapters: dict[str, str | None] = {op: op for op in OPERATIONS} | (adapters or {})
        self.max_new_tokens = {EXTRACT: 384, UPDATE: 256, GENERATE: 32} | (max_new_tokens or {})
        self._marks = marks_of(tokenizer)
        self._context = getattr(self.model.config, "max_position_embeddings", None)
        if self.bank is not None:
            missing = {a for a in self.adapters.values() if a} - set(self.bank.operations)
            if missing:
                raise ValueError(
                    f"the bank has no {min(missing)!r}, it has {', '.join(self.bank.operations)}; "
                    "say in `adapters` who does that operation (None: the base)"
                )
        elif adapters:
            raise ValueError("`adapters` chooses experts of a bank, and the model is none")

    def write(self, operation: str, conversations: Sequence[Messages]) -> list[Reply]:
        from mnemic.models.generation import generate

        if not conversations:
            return []
        prompts = [self.prompt(messages) for messages in conversations]
        eos, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        settings = {
            "eos_id": eos, "pad_id": eos if pad is None else pad, "batch_size": self.batch_size,
            "max_new_tokens": self.max_new_tokens[operation],
        }  # fmt: skip
        if self.bank is None:
            found = generate(self.model, prompts, **settings)
        else:
            by = [self.adapters[operation]] * len(prompts)
            found = self.bank.generate(prompts, by, **settings)
        return [
            # Marks stay in what is parsed, which then refuses them; an answer is shown as it is.
            Reply(
                self.tokenizer.decode(
                    one.ids if one.cut else one.ids[:-1],
                    skip_special_tokens=operation == GENERATE,
                ),
                one.cut, len(prompt), len(one.ids),
            )
            for prompt, one in zip(prompts, found, strict=True)
        ]  # fmt: skip

    def room(self, operation: str, messages: Messages) -> int | None:
        if self._context is None:
            return None
        return self._context - self.max_new_tokens[operation] - len(self.prompt(messages))

    def prompt(self, messages: Messages) -> list[int]:
        """Token ids: the tokenizer's chat template around them, where there is one."""
        messages = [{**m, "content": defuse(m["content"], self._marks)} for m in messages]
        if not getattr(self.tokenizer, "chat_template", None):
            text = "\n\n".join(m["content"] for m in messages)
            return list(self.tokenizer(f"{text}\nAnswer:").input_ids)
        return list(
            self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=False,
                enable_thinking=False,  # Qwen3's name; other templates read no such variable
            )
        )  # fmt: skip
