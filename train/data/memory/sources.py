"""Where episodes come from: published formats and our own, each a loader from a user's path to
`EpisodeRow`s, read lazily and the same for the same arguments.

    for episode in locomo("locomo10.json", conversations=range(6)): ...

Nothing is downloaded, and no data set lies in the package.
"""

from collections.abc import Callable, Iterator

from mnemic.train.data.formats import FormatError
from mnemic.train.data.memory.episode import EpisodeRow, as_episode
from mnemic.train.data.memory.locomo import locomo
from mnemic.train.data.memory.longmemeval import longmemeval
from mnemic.train.data.memory.memoryagentbench import memoryagentbench
from mnemic.train.data.memory.reading import Paths, records
from mnemic.train.data.memory.squad import squad
from mnemic.train.data.memory.ttl import ttl

__all__ = ["LOADERS", "jsonl", "locomo", "longmemeval", "memoryagentbench", "squad", "ttl"]


def jsonl(path: Paths) -> Iterator[EpisodeRow]:
    """Episodes of our own form (`mnemic.train.data.memory.episode`), one JSON object a line.

    Raises:
        UserError: a missing file, or one whose first line is no episode row.
        FormatError: on the way, for a damaged row.
    """
    found = records(path, "our episode format", ("id", "source", "chunks", "questions"))
    return (_episode(where, fields) for where, fields in found)


def _episode(where: str, fields: dict) -> EpisodeRow:
    try:
        return as_episode(fields)
    except FormatError as error:
        raise FormatError(f"{where}: {error}") from None


LOADERS: dict[str, Callable[..., Iterator[EpisodeRow]]] = {
    "jsonl": jsonl,
    "locomo": locomo,
    "longmemeval": longmemeval,
    "memoryagentbench": memoryagentbench,
    "squad": squad,
    "ttl": ttl,
}
"""By the name a recipe gives. Each takes the path first; the rest have defaults."""
