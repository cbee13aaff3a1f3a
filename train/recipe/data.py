"""Recipe part `data`: where rows come from. Column names are TRL's: text, messages, prompt +
completion.
"""

from typing import Annotated, Literal

from pydantic import Field

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


Data = Annotated[
    TextData | JsonlData | CsvData | ParquetData | HubData | FactsData,
    Field(discriminator="kind"),
    KindShorthand,
]
