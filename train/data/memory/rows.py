"""Episodes as rows of the data pipeline: whole ones for objective `grpo`, a teacher's turns for
`sft`. Generated streams are made row by row, so a position is an index.
"""

from collections.abc import Callable, Iterator
from itertools import islice

from mnemic.models.memory.episode import MemoryConfig
from mnemic.train.data.formats import FormatError
from mnemic.train.data.memory.episode import EpisodeRow, to_row
from mnemic.train.data.memory.kvstream import KvStream, episode
from mnemic.train.data.memory.sources import LOADERS
from mnemic.train.data.memory.teacher import Weaknesses, turns
from mnemic.train.data.rows import BadRow, Position, Row
from mnemic.train.errors import UserError
from mnemic.train.recipe.data import EpisodesData, KvStreamData, Stream


def kv_stream(part: Stream) -> KvStream:
    """The generator's knobs from the recipe's."""
    return KvStream(**{**part.model_dump(), "mix": dict(part.mix)})


class KvSource:
    """Episodes of a generated stream. `stage` (see `KvStreamData.stages`) may move on while rows
    are drawn; it is the objective's to keep.
    """

    def __init__(self, data: KvStreamData) -> None:
        self.data = data
        self.streams = [kv_stream(part) for part in (*data.stages, data.stream)]
        self.stage = 0 if data.stages else len(self.streams) - 1

    @property
    def num_stages(self) -> int:
        return len(self.streams)

    def episode(self, index: int) -> EpisodeRow:
        data = self.data
        return episode(self.streams[self.stage], data.split, index, data.seed)

    def read(self, position: Position | None) -> Iterator[Row | BadRow]:
        (first,) = position or [0]
        for index in range(first, self.data.size):
            fields = to_row(self.episode(index))
            yield Row(fields, f"kvstream/{self.data.split}:{index + 1}", [index + 1])


class TurnSource:
    """A teacher's turns on generated episodes, one SFT row a chunk."""

    def __init__(self, data: KvStreamData, memory: MemoryConfig) -> None:
        self.source, self.memory = KvSource(data), memory
        self.source.stage = len(self.source.streams) - 1
        self.weak = Weaknesses(**data.teacher.model_dump())

    def read(self, position: Position | None) -> Iterator[Row | BadRow]:
        first, skip = position or [0, 0]
        data = self.source.data
        for index in range(first, data.size):
            made = turns(self.source.episode(index), self.memory, self.weak, data.seed)
            for number, fields in enumerate(made):
                if number >= skip:
                    where = f"kvstream/{data.split}:{index + 1}, chunk {number + 1}"
                    yield Row(fields, where, [index, number + 1])
            skip = 0


class FileSource:
    """Episodes of a file in one of the published formats."""

    def __init__(self, data: EpisodesData, key: str) -> None:
        self.data = data
        self.load: Callable[[], Iterator[EpisodeRow]] = lambda: LOADERS[data.format](
            data.path, **_options(data)
        )
        try:
            next(self.load(), None)
        except FormatError as error:
            raise UserError(f"{key}.path: {error}") from None

    def read(self, position: Position | None) -> Iterator[Row | BadRow]:
        (first,) = position or [0]
        found = islice(self.load(), first, None)
        index = first
        while True:
            try:
                row = next(found, None)
            except FormatError as error:
                # A generator that raised is at its end: what follows the damage is not read.
                yield BadRow(str(error), self.data.path, [index + 1])
                return
            if row is None:
                return
            index += 1
            yield Row(to_row(row), f"{self.data.path}: episode {index}", [index])


def _options(data: EpisodesData) -> dict[str, object]:
    by_format: dict[str, dict[str, object]] = {
        "jsonl": {},
        "locomo": {
            "conversations": data.conversations, "chunk_chars": data.chunk_characters,
        },
        "longmemeval": {"chunk_chars": data.chunk_characters},
        "memoryagentbench": {"chunk_chars": data.chunk_characters},
        "squad": {"split": data.split, "seed": data.seed},
        "ttl": {"split": data.split, "seed": data.seed, "episodes": data.size},
    }  # fmt: skip
    return by_format[data.format]
