"""Recipe part `data`: where rows come from. Column names are TRL's: text, messages, prompt +
completion.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from mnemic.train.recipe.base import KindShorthand, Part


class _Data(Part):
    shuffle: bool = True
    """Permute rows (packed rows for objective `lm`) inside windows of `shuffle_window`."""
    shuffle_window: int = Field(10_000, ge=1)
    """Rows held in memory for shuffling; a smaller data set is permuted whole, anew each epoch."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """A row that cannot be used ends the run, or is reported, counted and skipped."""


class _Files(_Data):
    path: str | list[str]
    """One file, several, or glob patterns; read in sorted order."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Renames columns to TRL's names: `{prompt: question, completion: answer}`."""


class TextData(_Data):
    """Plain UTF-8 text files, for objective `lm`."""

    kind: Literal["text"] = "text"
    path: str | list[str]
    """One file, several, or glob patterns; read in sorted order."""
    document: Literal["file", "line", "paragraph"] = "file"
    """What ends with an end-of-text token: each file, each line, or each block between blank lines.
    """


class JsonlData(_Files):
    """One JSON object a line."""

    kind: Literal["jsonl"] = "jsonl"


class CsvData(_Files):
    """Comma-separated values with a header line."""

    kind: Literal["csv"] = "csv"
    delimiter: str = Field(",", min_length=1, max_length=1)
    """Column separator, one character."""


class ParquetData(_Files):
    """Parquet files, read a row group at a time (needs pyarrow: extra `data`)."""

    kind: Literal["parquet"] = "parquet"


class HubData(_Data):
    """A data set of the Hugging Face hub, or any name `datasets.load_dataset` takes (extra
    `data`).
    """

    kind: Literal["hub"] = "hub"
    name: str
    """Name on the hub."""
    config: str | None = None
    """Configuration (subset) name."""
    split: str = "train"
    """Split name."""
    revision: str | None = None
    """Branch, tag or commit."""
    streaming: bool = False
    """Read over the network row by row instead of downloading first."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Renames columns to TRL's names: `{prompt: question, completion: answer}`."""


class FactsData(_Data):
    """Generated dialogue turns with the facts to remember, as prompt + completion; no two rows are
    equal.

    The splits share no name, no value and no sentence template.
    """

    kind: Literal["facts"] = "facts"
    split: Literal["train", "heldout"] = "train"
    """Which of the two disjoint families of rows."""
    size: int = Field(512, ge=1)
    """Number of rows."""
    seed: int = 0
    """Seed of the generator."""


class Teacher(Part):
    """Weaknesses of the teacher that writes the operations of objective `sft`: chances, 0 to 1."""

    drop: float = Field(default=0.0, ge=0, le=1)
    """Leaves a new fact out."""
    insert_for_update: float = Field(default=0.0, ge=0, le=1)
    """Inserts where it should update."""
    skip_delete: float = Field(default=0.0, ge=0, le=1)
    """Lets stand what ended."""
    keep_noise: float = Field(default=0.0, ge=0, le=1)
    """Remembers small talk."""
    first_id: int = Field(default=0, ge=0)
    """Entries of an episode are numbered from a random start up to this, so that the ids of streams
    longer than those trained on are known.
    """


class Stream(Part):
    """Knobs of a generated stream. Chances are of one event; what is left over is a new fact."""

    n_chunks: int = Field(default=4, ge=1)
    """Chunks of an episode."""
    events_per_chunk: int = Field(default=2, ge=1)
    """Lines of a chunk."""
    p_update: float = Field(default=0.25, ge=0, le=1)
    """A fact changes."""
    p_delete: float = Field(default=0.1, ge=0, le=1)
    """A fact ends."""
    p_noise: float = Field(default=0.3, ge=0, le=1)
    """Small talk."""
    p_repeat: float = Field(default=0.0, ge=0, le=1)
    """A fact is said again."""
    n_entities: int = Field(default=8, ge=1)
    """Names of an episode."""
    n_attributes: int = Field(default=4, ge=1, le=6)
    """Attributes of a name."""
    n_values: int = Field(default=8, ge=2)
    """Values of an attribute."""
    gap: int = Field(default=1, ge=0)
    """Chunks at least between a write and its change."""
    questions: int = Field(default=4, ge=1)
    """Questions at the end, at most."""
    mix: dict[
        Literal["current", "updated", "abstain", "previous", "count", "same"],
        Annotated[float, Field(ge=0)],
    ] = Field(default_factory=lambda: {"current": 0.4, "updated": 0.4, "abstain": 0.2})
    """Weights of question types."""
    style: Literal["plain", "natural", "wide"] = "plain"
    """Bare words, or sentences whose names, values and templates the splits do not share; wide has
    many more of them for training.
    """
    family: Literal["facts", "labels"] = "facts"
    """Facts about people, or classes and their numbers."""
    dates: bool = False
    """Begin each chunk with a date."""

    @model_validator(mode="after")
    def _check(self) -> "Stream":
        share = self.p_update + self.p_delete + self.p_repeat
        if share > 1:
            raise ValueError(f"p_update + p_delete + p_repeat is {share:g}; at most 1")
        if not any(self.mix.values()):
            raise ValueError("mix: all weights are 0, so nothing would be asked")
        return self


class OperationStream(Stream):
    """The stream that `operations` rows are made from: real sentences, many changes."""

    n_chunks: int = Field(default=6, ge=1)
    """Chunks of an episode."""
    n_attributes: int = Field(default=6, ge=1, le=6)
    """Attributes of a name."""
    n_values: int = Field(default=20, ge=2)
    """Values of an attribute."""
    p_update: float = Field(default=0.3, ge=0, le=1)
    """A fact changes."""
    p_delete: float = Field(default=0.15, ge=0, le=1)
    """A fact ends."""
    p_repeat: float = Field(default=0.1, ge=0, le=1)
    """A fact is said again."""
    style: Literal["plain", "natural", "wide"] = "wide"
    """natural or wide: sentences whose names, values and templates the splits do not share; wide
    has many more of them for training.
    """


class KvStreamData(_Data):
    """Generated streams of facts that arrive, change, end and are asked for; every right answer and
    operation is known. Episodes for objective `grpo`, a teacher's turns for `sft`.
    """

    kind: Literal["kvstream"] = "kvstream"
    split: Literal["train", "heldout"] = "train"
    """Which of the two disjoint families of episodes."""
    size: int = Field(1024, ge=1)
    """Number of episodes."""
    seed: int = 0
    """Seed of the generator."""
    stream: Stream = Stream()
    """What the episodes are like."""
    stages: list[Stream] = Field(default_factory=list)
    """A curriculum for objective `grpo`: these first, each until `mastery`, then `stream`."""
    mastery: float = Field(0.9, gt=0, le=1)
    """Mean r1 of the last 8 steps at which the next stage begins."""
    teacher: Teacher = Teacher()
    """Weaknesses of the teacher (objective `sft`)."""


class EpisodesData(_Data):
    """Streams with questions from files: our JSONL rows, or a published data set."""

    kind: Literal["episodes"] = "episodes"
    format: Literal["jsonl", "locomo", "longmemeval", "memoryagentbench", "squad", "ttl"] = "jsonl"
    """How the file is written."""
    path: str
    """The file."""
    split: Literal["train", "heldout"] = "train"
    """Part of the paragraphs (squad) or texts (ttl)."""
    conversations: list[int] | None = None
    """locomo: which conversations; null for all."""
    chunk_characters: int = Field(4000, ge=200)
    """Longest chunk, where the format does not say."""
    size: int = Field(64, ge=1)
    """Episodes made of the file (ttl)."""
    seed: int = 0
    """Seed of what is drawn (squad, ttl)."""


class OperationsData(_Data):
    """Right answers to the memory operations' prompts on generated streams: rows with `operation`,
    `prompt` and `completion`, for an adapter bank or one adapter. No prompt comes twice, and the
    splits share no name, no value and no sentence template.
    """

    kind: Literal["operations"] = "operations"
    operations: list[Literal["mem_extract", "mem_update", "mem_generate"]] = Field(
        default_factory=lambda: ["mem_extract", "mem_update", "mem_generate"], min_length=1
    )
    """Which operations, in turn."""
    split: Literal["train", "heldout"] = "train"
    """Which of the two disjoint families of rows."""
    size: int = Field(256, ge=1)
    """Rows of each operation."""
    seed: int = 0
    """Seed of the generator."""
    stream: OperationStream = OperationStream()
    """What the episodes are like. Fewer names and fewer new facts make more of the rows changes."""


EpisodeData = KvStreamData | EpisodesData

Data = Annotated[
    TextData
    | JsonlData
    | CsvData
    | ParquetData
    | HubData
    | FactsData
    | KvStreamData
    | EpisodesData
    | OperationsData,
    Field(discriminator="kind"),
    KindShorthand,
]
