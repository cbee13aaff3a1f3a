"""What the loaders share: records out of JSON, JSONL and parquet files, text cut into chunks, and
the split into training and held-out data.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from mnemic.train.data.formats import FormatError
from mnemic.train.data.rows import BadRow, Source
from mnemic.train.data.sources import JsonlSource, ParquetSource, find_files
from mnemic.train.errors import UserError

Paths = str | Path | list[str]
Record = tuple[str, dict[str, Any]]
"""Where it stands, for an error, and its fields."""

MIN_CHUNK = 200
"""Characters. A smaller chunk has no room for a date line and a turn."""

_BLOCK = 1 << 20
_BETWEEN = re.compile(r"[\s,]*")
_DATE = re.compile(r"Date: ([^\n]+)\n")
_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s)|\n")


def files(path: Paths) -> list[Path]:
    """The files of a path, a list of paths or a glob. Raises `UserError` if there is none."""
    return find_files([str(p) for p in path] if isinstance(path, list) else str(path), "data")


def records(path: Paths, form: str, needs: Sequence[str]) -> Iterator[Record]:
    """The objects of `.json` (a list, or one object), `.jsonl` or `.parquet` files, one at a time.

    Memory does not grow with the file. `form` names the format and `needs` the keys that each
    object has; a first object without them makes the file a foreign one.

    Raises:
        UserError: at the call, for a missing, unreadable or foreign file.
        FormatError: on the way, for a record that lacks a key or cannot be read.
    """
    found = chain.from_iterable(_read(file) for file in files(path))
    needed = ", ".join(needs)
    advice = f"a record of {form} has {needed}; give such a file, or name the format this one has"
    try:
        first = next(found, None)
    except FormatError as error:
        raise UserError(f"{error}; {advice}") from None
    if first is None:
        raise UserError(f"data.path: {path} holds no records; {advice}")
    where, fields = first
    if not all(key in fields for key in needs):
        have = ", ".join(list(fields)[:8]) or "nothing"
        raise UserError(f"{where}: not {form}, its keys are {have}; {advice}")
    return _checked(chain([first], found), needs)


def _checked(found: Iterable[Record], needs: Sequence[str]) -> Iterator[Record]:
    for where, fields in found:
        for key in needs:
            if key not in fields:
                raise FormatError(f"{where}: no {key!r}; needs {', '.join(needs)}")
        yield where, fields


def _read(path: Path) -> Iterator[Record]:
    if path.suffix == ".parquet":
        return rows(ParquetSource([path], {}))
    if path.suffix == ".jsonl":
        return rows(JsonlSource([path]))
    return _json_objects(path)


def rows(source: Source) -> Iterator[Record]:
    """The rows of a source of `mnemic.train.data.sources`; a bad one raises `FormatError`."""
    for row in source.read(None):
        if isinstance(row, BadRow):
            raise FormatError(f"{row.where}: {row.reason}")
        yield row.where, row.fields


def _json_objects(path: Path) -> Iterator[Record]:
    """The objects of a JSON list, or objects one after the other."""
    decoder = json.JSONDecoder()
    text, at, block, ended, number, inside = "", 0, _BLOCK, False, 0, False
    with path.open(encoding="utf-8-sig") as file:
        while True:
            at = _next(text, at)
            if text.startswith("[", at) and not inside:
                inside, at = True, at + 1
                continue
            if text.startswith("]", at) if inside else ended and at == len(text):
                return
            where = f"{path}: record {number + 1}"
            try:
                value, at = decoder.raw_decode(text, at)
            except (json.JSONDecodeError, RecursionError) as error:
                if ended:
                    cut = " (a truncated file?)" if inside else ""
                    raise FormatError(f"{where}: not valid JSON: {error}{cut}") from None
                # The text may end inside the object. Each try reads twice as much as the one
                # before, so a large object is not decoded over and over.
                try:
                    more = file.read(block)
                except UnicodeDecodeError as error:
                    raise FormatError(f"{where}: not UTF-8 text ({error.reason})") from None
                text, at, block, ended = text[at:] + more, 0, 2 * block, not more
                continue
            number, block = number + 1, _BLOCK
            if not isinstance(value, dict):
                raise FormatError(f"{where}: a JSON {type(value).__name__}, not an object")
            yield where, value


def _next(text: str, at: int) -> int:
    match = _BETWEEN.match(text, at)
    assert match is not None
    return match.end()


def split_text(text: str, limit: int) -> list[str]:
    """Pieces of at most `limit` characters, without the white space around them.

    A piece ends at a blank line if one lies in its second half, else at the last line or sentence
    end, else between words, else anywhere.
    """
    pieces: list[str] = []
    start = 0
    while start < len(text):
        stop = min(start + limit, len(text))
        if stop < len(text):
            stop = _cut(text, start, stop)
        if piece := text[start:stop].strip():
            pieces.append(piece)
        start = stop
    return pieces


def _cut(text: str, start: int, stop: int) -> int:
    blank = text.rfind("\n\n", start + (stop - start) // 2, stop)
    if blank > start:
        return blank
    # One character further: a sentence may end exactly at `stop`.
    ends = [match.end() for match in _SENTENCE_END.finditer(text, start + 1, stop + 1)]
    ends = [end for end in ends if end <= stop]
    if ends:
        return ends[-1]
    space = text.rfind(" ", start + 1, stop + 1)
    return space if space > start else stop


def turn_chunks(date: str, turns: Iterable[str], limit: int) -> tuple[list[str], list[list[int]]]:
    """A dated session in chunks of at most `limit` characters, cut between turns, each beginning
    with its date line; and for each turn the indices of the chunks that hold it.

    A turn too long for a chunk is cut in its text. A session without turns has no chunks.
    """
    # Cut, so that there is room for text beside it even in the smallest chunk.
    head = f"Date: {date}"[:100] if date else ""
    room = limit - len(head) - 1
    chunks: list[list[str]] = []
    places: list[list[int]] = []
    held = room
    for turn in turns:
        places.append([])
        for piece in split_text(turn, room):
            if not chunks or held + 1 + len(piece) > room:
                chunks.append([head] if head else [])
                held = -1
            chunks[-1].append(piece)
            held += 1 + len(piece)
            places[-1].append(len(chunks) - 1)
    return ["\n".join(lines) for lines in chunks], places


def dated(chunk: str) -> tuple[str | None, str]:
    """The date and the text of a chunk that begins with a date line, as `turn_chunks` writes it."""
    match = _DATE.match(chunk)
    return (match[1].strip(), chunk[match.end() :]) if match else (None, chunk)


def check_chunk_chars(chunk_chars: int) -> None:
    if chunk_chars < MIN_CHUNK:
        raise ValueError(f"chunk_chars must be at least {MIN_CHUNK}, got {chunk_chars}")


def check_split(split: str) -> None:
    if split not in ("train", "heldout"):
        raise ValueError(f"split must be train or heldout, got {split!r}")


def part(texts: Iterable[str], split: str, heldout: float) -> list[str]:
    """The texts of a split, sorted by their hash: the same for any order of the file and any seed.

    `heldout` is the share held out, at least one text and never all (of two texts or more).
    """
    check_split(split)
    ranked = sorted(set(texts), key=lambda text: hashlib.sha256(text.encode()).digest())
    count = min(max(round(heldout * len(ranked)), 1), len(ranked) - 1)
    return ranked[:count] if split == "heldout" else ranked[count:]


def get(fields: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """`fields[key]`, of that type. Raises `FormatError` with the place if it is not there."""
    if not isinstance(fields, dict):
        raise FormatError(f"{where}: a JSON {type(fields).__name__}, not an object with {key!r}")
    if key not in fields:
        raise FormatError(f"{where}: no {key!r}; it has {', '.join(map(str, fields)) or 'nothing'}")
    value = fields[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        names = " or ".join(k.__name__ for k in kinds)
        raise FormatError(f"{where}: {key} is a {type(value).__name__}; needs {names}")
    return value


def answer_text(value: Any, where: str) -> str:
    """A gold as text: published files hold years and counts as numbers."""
    if isinstance(value, (str, int, float)) and not isinstance(value, bool) and str(value).strip():
        return str(value).strip()
    raise FormatError(f"{where}: the answer is {value!r}; needs text or a number")
