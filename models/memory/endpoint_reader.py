"""An answerer behind an OpenAI-compatible endpoint: the large frozen reader of the papers, or any
hosted model, with the prompt that local readers get.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mnemic.models.memory.answer import Ask
from mnemic.models.memory.endpoint import Endpoint, Messages
from mnemic.models.memory.text import defuse, first_line, memory_text, reader_prompt


class EndpointReader:
    """Of the memory at most `max_memory_tokens` (the store's) are sent; where not all fits, the `k`
    best entries. `settings` are those of `Endpoint`, whose counters are at `.endpoint`.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        k: int = 10,
        max_memory_tokens: int = 2048,
        cache: Path | None = None,
        max_tokens: int = 64,
        **settings: Any,
    ) -> None:
        self.endpoint = Endpoint(
            base_url, model, cache=cache, max_tokens=max_tokens, **settings
        )  # fmt: skip
        self.k, self.max_memory_tokens = k, max_memory_tokens

    def answer(self, asks: Sequence[Ask]) -> list[str]:
        """The first line of each answer, stripped. `EndpointError` where the endpoint fails."""
        found = self.endpoint.complete([self.messages(ask) for ask in asks])
        return [first_line(text) for text in found]

    def messages(self, ask: Ask) -> Messages:
        memory = memory_text(ask, self.k, self.max_memory_tokens, ask.memory.count)
        prompt = reader_prompt(defuse(memory), defuse(ask.question))
        return [{"role": "user", "content": prompt}]
