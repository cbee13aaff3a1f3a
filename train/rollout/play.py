"""Playing episodes: all that are not done go on by one chunk together, in one batched generation.

Nothing is decoded and tokenised again: a row's ids are those that were sampled.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mnemic.models.generation import Generated, generate
from mnemic.models.memory.answer import Answerer
from mnemic.models.memory.episode import MemoryEpisode
from mnemic.train.errors import UserError


@dataclass(frozen=True, slots=True)
class TurnRow:
    """A chunk as a training row: `prompt` and `completion` token ids of turn `turn` of `episode`
    (its index in the batch); `completion` holds the end token where it came.
    """

    episode: int
    turn: int
    prompt: list[int]
    completion: list[int]


class Generator(Protocol):
    """Writes continuations; sampled with `seeds`, greedy without. `prepare` comes before each batch
    of rollouts, on every rank.
    """

    def prepare(self) -> None: ...

    def __call__(
        self, prompts: Sequence[list[int]], seeds: Sequence[int] | None
    ) -> list[Generated]: ...


class ModelGenerator:
    """transformers' generate on a model of this process."""

    def __init__(self, model: Any, tokenizer: Any, *, max_new_tokens: int, batch_size: int) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size

    def prepare(self) -> None:
        """Nothing: it writes with the weights as they are."""

    def __call__(
        self, prompts: Sequence[list[int]], seeds: Sequence[int] | None
    ) -> list[Generated]:
        return generate(
            self.model, prompts, eos_id=self.tokenizer.eos_token_id,
            pad_id=self.tokenizer.pad_token_id, max_new_tokens=self.max_new_tokens,
            batch_size=self.batch_size, seeds=seeds,
        )  # fmt: skip


def play(
    episodes: Sequence[MemoryEpisode],
    generator: Generator,
    tokenizer: Any,
    *,
    max_length: int,
    max_new_tokens: int,
    seeds: Sequence[str] | None = None,
) -> list[TurnRow]:
    """Play every episode to its last chunk; `seeds` (one an episode) sample, None is greedy.

    A prompt that leaves no room for `max_new_tokens` within `max_length` is a `UserError`.
    """
    rows: list[TurnRow] = []
    while active := [i for i, e in enumerate(episodes) if not e.done]:
        prompts = [episodes[i].observe(tokenizer) for i in active]
        longest = max(map(len, prompts))
        if longest + max_new_tokens > max_length:
            raise UserError(
                f"a chunk with its memory takes {longest} tokens, and with "
                f"memory.max_new_tokens={max_new_tokens} more than objective.max_length="
                f"{max_length}; raise that, or lower memory.view_tokens or the size of chunks"
            )
        numbers = None
        if seeds is not None:
            numbers = [seed_of(f"{seeds[i]}/{len(episodes[i].turns)}") for i in active]
        for i, prompt, made in zip(active, prompts, generator(prompts, numbers), strict=True):
            rows.append(TurnRow(i, len(episodes[i].turns), prompt, made.ids))
            episodes[i].step(decode(tokenizer, made), cut=made.cut)
    return rows


def decode(tokenizer: Any, made: Generated) -> str:
    """The text of a continuation; marks other than the end token stay, for the parser to see."""
    ids = made.ids if made.cut else made.ids[:-1]
    return tokenizer.decode(ids, skip_special_tokens=False)


def seed_of(text: str) -> int:
    """A number of 63 bits that depends on all of `text`."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def ask_all(
    episodes: Sequence[MemoryEpisode], asked: Sequence[Sequence[int]], answerer: Answerer
) -> list[list[str]]:
    """The answers of each episode to its questions numbered `asked`, in one batch."""
    asks = [
        ask
        for episode, chosen in zip(episodes, asked, strict=True)
        for ask in (episode.asks()[i] for i in chosen)
    ]
    answers = iter(answerer.answer(asks))
    return [[next(answers) for _ in chosen] for chosen in asked]
