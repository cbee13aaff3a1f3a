"""Sources: text, JSONL, CSV, parquet, hub and generated rows, each readable from any position it
has given.

All read as streams: memory does not grow with the file. Each row knows its file and line.
"""

import csv
import glob
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from mnemic.models.memory.episode import MemoryConfig
from mnemic.train.data.rows import BadRow, Position, Row, Source
from mnemic.train.errors import UserError
from mnemic.train.recipe.data import (
    CsvData,
    Data,
    EpisodesData,
    FactsData,
    HubData,
    JsonlData,
    KvStreamData,
    OperationsData,
    ParquetData,
    TextData,
)


def open_source(data: Data, *, key: str = "data", turns: MemoryConfig | None = None) -> Source:
    """The source a recipe's `data` section names. Missing files and packages raise `UserError`.

    `turns`: give the turns of a memory manager on generated streams, not their episodes.
    """
    if isinstance(data, KvStreamData):
        from mnemic.train.data.memory.rows import KvSource, TurnSource

        return KvSource(data) if turns is None else TurnSource(data, turns)
    if isinstance(data, EpisodesData):
        from mnemic.train.data.memory.rows import FileSource

        return FileSource(data, key)
    if isinstance(data, TextData):
        return TextSource(find_files(data.path, key), data.document)
    if isinstance(data, JsonlData):
        return JsonlSource(find_files(data.path, key), data.columns)
    if isinstance(data, CsvData):
        return CsvSource(find_files(data.path, key), data.columns, data.delimiter)
    if isinstance(data, ParquetData):
        return ParquetSource(find_files(data.path, key), data.columns)
    if isinstance(data, HubData):
        return HubSource(data)
    if isinstance(data, OperationsData):
        from mnemic.train.data.memory.operations_rows import mixed_rows
        from mnemic.train.data.memory.rows import kv_stream

        made = kv_stream(data.stream)
        try:
            return ListSource(
                mixed_rows(data.operations, data.split, data.size, stream=made, seed=data.seed),
                f"operations/{data.split}",
            )
        except ValueError as error:
            raise UserError(f"{key}.size={data.size}: {error}") from None
    assert isinstance(data, FactsData)
    from mnemic.train.data.facts import facts_rows

    try:
        return ListSource(facts_rows(data.split, data.size, data.seed), f"facts/{data.split}")
    except ValueError as error:
        raise UserError(f"{key}.size={data.size}: {error}") from None


def find_files(paths: str | list[str], key: str) -> list[Path]:
    """Files behind paths and globs, sorted within each glob; a path that finds none is an error."""
    found: list[Path] = []
    for pattern in [paths] if isinstance(paths, str) else paths:
        pattern = str(Path(pattern).expanduser())
        hits = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
        files = [Path(hit) for hit in hits if Path(hit).is_file()]
        if not files:
            what = "is a folder; name its files, such as" if Path(pattern).is_dir() else "not found"
            hint = f" {pattern}/*" if Path(pattern).is_dir() else f" (from {Path.cwd()})"
            raise UserError(f"{key}.path: {pattern} {what}{hint}")
        found += files
    if not found:
        raise UserError(f"{key}.path: names no file")
    for path in found:
        if path.stat().st_size == 0:
            raise UserError(f"{key}.path: {path} is empty")
        try:
            path.open("rb").close()
        except OSError as error:
            raise UserError(f"{key}.path: {path}: {error.strerror}") from None
    return found


def _rename(fields: dict[str, Any], columns: dict[str, str]) -> dict[str, Any] | str:
    """Apply `data.columns` (target: source); a sentence if a source column is missing."""
    if not columns:
        return fields
    renamed = {k: v for k, v in fields.items() if k not in columns.values()}
    for target, source in columns.items():
        if source not in fields:
            return f"no column {source!r} (data.columns); it has {', '.join(map(str, fields))}"
        renamed[target] = fields[source]
    return renamed


def _read_line(file: BinaryIO, limit: int) -> bytes:
    """A line, or about `limit` bytes of a longer one, cut between two UTF-8 characters."""
    line = file.readline(limit)
    if len(line) < limit or line.endswith(b"\n"):
        return line
    for back in range(1, 4):
        lead = line[-back]
        if lead & 0xC0 != 0x80:
            length = 4 if lead >= 0xF0 else 3 if lead >= 0xE0 else 2 if lead >= 0xC0 else 1
            if length > back:
                file.seek(-back, 1)
                return line[:-back]
            break
    return line


def _cut(file: BinaryIO, offset: int, limit: int) -> int:
    """Where a text is parted near byte `offset`: behind the line that holds the byte before it.

    In a line longer than `limit` it is the next start of a UTF-8 character.
    """
    if offset <= 0:
        return 0
    file.seek(offset - 1)
    line = file.readline(limit)
    if line.endswith(b"\n") or len(line) < limit:
        return offset - 1 + len(line)
    return offset + next(i for i, byte in enumerate(line[1:]) if byte & 0xC0 != 0x80)


class TextSource:
    """Pieces of text of about `PIECE` bytes, cut at line ends; `last` marks the end of a document.

    `share` keeps a part of all bytes: (0, 0.9) is the first nine tenths, cut at a line.
    """

    PIECE = 1 << 14

    def __init__(self, files: list[Path], document: str = "file") -> None:
        self.files, self.document = files, document
        self.share = (0.0, 1.0)

    def read(self, position: Position | None) -> Iterator[Row | BadRow]:
        first, offset, number = position or [0, 0, 0]
        sizes = [path.stat().st_size for path in self.files]
        start, stop = (int(edge * sum(sizes)) for edge in self.share)
        before = sum(sizes[:first])
        for index in range(first, len(self.files)):
            low, high = start - before, stop - before
            before += sizes[index]
            if high > 0 and low < sizes[index]:
                yield from self._read_file(index, offset, number, low, high)
            offset = number = 0

    def _read_file(
        self, index: int, offset: int, number: int, low: int, high: int
    ) -> Iterator[Row | BadRow]:
        path = self.files[index]
        with path.open("rb") as file:
            stop = _cut(file, min(high, path.stat().st_size), self.PIECE)
            offset = max(offset, _cut(file, low, self.PIECE))
            file.seek(offset)
            lines: list[bytes] = []
            held, first_line = 0, number + 1
            while offset < stop:
                line = _read_line(file, min(self.PIECE, stop - offset))
                offset += len(line)
                number += line.endswith(b"\n")
                lines.append(line)
                held += len(line)
                ends = offset >= stop
                if self.document == "line":
                    ends = ends or line.endswith(b"\n")
                elif self.document == "paragraph":
                    ends = ends or not line.strip()
                if ends or held >= self.PIECE:
                    yield from self._piece(
                        lines, f"{path}:{first_line}", [index, offset, number], ends
                    )
                    lines, held, first_line = [], 0, number + 1

    def _piece(
        self, lines: list[bytes], where: str, after: Position, ends: bool
    ) -> Iterator[Row | BadRow]:
        raw = b"".join(lines)
        if not raw.strip() and self.document != "file":
            return
        if b"\0" in raw:
            yield BadRow("holds a zero byte: a binary file, not text", where, after)
            return
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            yield BadRow(f"not UTF-8 text ({error.reason})", where, after)
            return
        yield Row({"text": text, "last": ends}, where, after)


class JsonlSource:
    """One JSON object a line; empty lines are passed over."""

    def __init__(self, files: list[Path], columns: dict[str, str] | None = None) -> None:
        self.files, self.columns = files, columns or {}

    def read(self, position: Position | None) -> Iterator[Row | BadRow]:
        first, offset, number = position or [0, 0, 0]
        for index in range(first, len(self.files)):
            with self.files[index].open("rb") as file:
                file.seek(offset)
                for line in file:
                    offset += len(line)
                    number += 1
                    where = f"{self.files[index]}:{number}"
                    if line.strip():
                        yield self._parse(line, where, [index, offset, number])
            offset = number = 0

    def _parse(self, line: bytes, where: str, after: Position) -> Row | BadRow:
        try:
            fields = json.loads(line.decode("utf-8-sig"))
        except UnicodeDecodeError:
            return BadRow("not UTF-8 text: a binary file?", where, after)
        except json.JSONDecodeError as error:
            cut = " (the line ends early: a truncated file?)" if not line.endswith(b"\n") else ""
            return BadRow(f"not valid JSON: {error.msg} at column {error.colno}{cut}", where, after)
        except RecursionError:
            return BadRow("not usable JSON: nested too deep", where, after)
        if not isinstance(fields, dict):
            return BadRow(f"a JSON {type(fields).__name__}, not an object", where, after)
        renamed = _rename(fields, self.columns)
        return (
            BadRow(renamed, where, after)
            if isinstance(renamed, str)
            else Row(renamed, where, after)
        )


class CsvSource:
    """CSV with a header line. A position is a row number: quoted cells may span lines."""

    def __init__(self, files: list[Path], columns: dict[str, str], delimiter: str) -> None:
        self.files, self.columns, self.delimiter = files, columns, delimiter

    def read(self, position: Position | None) -> Iterator[Row | BadRow]:
        first, skip = position or [0, 0]
        for index in range(first, len(self.files)):
            path = self.files[index]
            with path.open("r", encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
                reader = csv.reader(file, delimiter=self.delimiter, strict=True)
                header: list[str] = []
                count = 0
                while True:
                    try:
                        cells = next(reader)
                    except StopIteration:
                        break
                    except csv.Error as error:
                        count += 1
                        if count > skip:
                            where = f"{path}:{reader.line_num}"
                            yield BadRow(f"not valid CSV: {error}", where, [index, count])
                        continue
                    if not header:
                        header = cells
                        continue
                    if not cells:
                        continue
                    count += 1
                    if count > skip:
                        yield self._row(header, cells, f"{path}:{reader.line_num}", [index, count])
            skip = 0

    def _row(
        self, header: list[str], cells: list[str], where: str, after: Position
    ) -> Row | BadRow:
        if len(cells) != len(header):
            return BadRow(f"{len(cells)} cells under {len(header)} columns", where, after)
        if any("\udc80" <= char <= "\udcff" for cell in cells for char in cell):
            return BadRow("not UTF-8 text: a binary file?", where, after)
        renamed = _rename(dict(zip(header, cells, strict=True)), self.columns)
        return (
            BadRow(renamed, where, after)
            if isinstance(renamed, str)
            else Row(renamed, where, after)
        )


class ParquetSource:
    """Parquet by row groups; whole groups before the position are passed over unread."""

    def __init__(self, files: list[Path], columns: dict[str, str]) -> None:
        try:
            import pyarrow.parquet as parquet
        except ImportError:
            raise UserError("data.kind=parquet needs pyarrow: pip install 'mnemic[data]'") from None
        self.files, self.columns, self.parquet = files, columns, parquet
        for path in files:
            self._open(path)

    def _open(self, path: Path) -> Any:
        try:
            return self.parquet.ParquetFile(path)
        except Exception as error:
            # pyarrow raises many types for a damaged file; each means the same to the user.
            raise UserError(f"{path}: not a readable parquet file ({error})") from None

    def read(self, position: Position | None) -> Iterator[Row | BadRow]:
        first, skip = position or [0, 0]
        for index in range(first, len(self.files)):
            file = self._open(self.files[index])
            count = 0
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if count + size <= skip:
                    count += size
                    continue
                for fields in file.read_row_group(group).to_pylist():
                    count += 1
                    if count <= skip:
                        continue
                    where, after = f"{self.files[index]}:row {count}", [index, count]
                    renamed = _rename(fields, self.columns)
                    bad = isinstance(renamed, str)
                    yield BadRow(renamed, where, after) if bad else Row(renamed, where, after)
            skip = 0


class HubSource:
    """`datasets.load_dataset`, map-style or streaming."""

    def __init__(self, data: HubData) -> None:
        try:
            import datasets
        except ImportError:
            raise UserError("data.kind=hub needs datasets: pip install 'mnemic[data]'") from None
        try:
            self.rows: Any = datasets.load_dataset(
                data.name, data.config, split=data.split, revision=data.revision,
                streaming=data.streaming,
            )  # fmt: skip
        except Exception as error:
            # load_dataset raises its own, the hub's, the network's and the file system's types.
            first = (
                str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            )
            raise UserError(f"data.name: {data.name} could not be loaded: {first}") from None
        self.name, self.columns, self.streaming = data.name, data.columns, data.streaming
        self.size = 0 if data.streaming else len(self.rows)

    def _row(self, index: int) -> Any:
        return self.rows[index]

    def read(self, position: Position | None) -> Iterator[Row | BadRow]:
        (count,) = position or [0]
        # skip() of a map-style set refuses to skip all of it.
        rest = self.rows.skip(count) if self.streaming else map(self._row, range(count, self.size))
        for fields in rest:
            count += 1
            where = f"{self.name}:row {count}"
            renamed = _rename(dict(fields), self.columns)
            bad = isinstance(renamed, str)
            yield BadRow(renamed, where, [count]) if bad else Row(renamed, where, [count])


class ListSource:
    """Rows already in memory."""

    def __init__(self, rows: Sequence[Any], name: str) -> None:
        self.rows, self.name = rows, name

    def read(self, position: Position | None) -> Iterator[Row | BadRow]:
        (first,) = position or [0]
        for index in range(first, len(self.rows)):
            yield Row(self.rows[index], f"{self.name}:row {index + 1}", [index + 1])
