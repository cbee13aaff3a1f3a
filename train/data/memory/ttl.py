"""Test-time learning: labelled utterances arrive over the stream, and the questions ask for the
label of others. Labels are numbers without a meaning, so only what was read can tell (Mem-alpha,
arXiv 2509.25911, section 4.1).
"""

import random
import re
from collections.abc import Iterator
from pathlib import Path

from mnemic.train.data.formats import FormatError
from mnemic.train.data.memory.episode import EpisodeRow, Question
from mnemic.train.data.memory.reading import Paths, check_split, files, part, rows
from mnemic.train.data.sources import CsvSource
from mnemic.train.errors import UserError

Pools = dict[str, list[str]]
"""Texts by label."""

_TREC = re.compile(r"([A-Z]+):(\w+)\s+(\S.*)")
_HEADERS = ("text,category", "text,label")


def ttl(
    path: Paths,
    episodes: int = 100,
    chunks: int = 10,
    examples: int = 20,
    questions: int = 20,
    labels: int | None = None,
    split: str = "train",
    heldout: float = 0.2,
    fine: bool = False,
    seed: int = 0,
) -> Iterator[EpisodeRow]:
    """Episodes from a CSV file (header `text,category` or `text,label`: BANKING77, CLINC, NLU) or a
    TREC `.label` file (`COARSE:fine question`, latin-1).

    A chunk is `examples` lines `text -> label N`; a question asks for the number of a text that the
    stream does not hold, and its evidence is the chunks that show its label. Numbers are dealt anew
    for each episode, and each label is shown at least once. The same arguments give the same
    episodes, and a larger `episodes` continues the list of a smaller one. Texts given twice count
    once; texts with two labels are left out.

    Args:
        labels: labels of an episode, drawn anew for each; None for all.
        split: "train" or "heldout": of each label's texts a share of `heldout` is held out, by
            the text alone, so that no text is in both, whatever the seed.
        fine: the fine labels of a TREC file (50) instead of the coarse (6).

    Raises:
        UserError: a missing or foreign file, or one with too few texts or labels for these numbers.
        FormatError: a damaged line; the whole file is read at the call.
        ValueError: an argument out of its range.
    """
    check_split(split)
    counts = {"episodes": episodes, "chunks": chunks, "examples": examples, "questions": questions}
    for key, value in {**counts, "labels": 1 if labels is None else labels}.items():
        if value < 1:
            raise ValueError(f"{key} must be at least 1, got {value}")
    if not 0 < heldout < 1:
        raise ValueError(f"heldout must be between 0 and 1, got {heldout}")
    pools = {
        label: texts
        for label, found in sorted(_read(path, fine).items())
        # One to show and one to ask.
        if len(texts := part(found, split, heldout)) >= 2
    }
    count = len(pools) if labels is None else labels
    if not 0 < count <= len(pools):
        raise UserError(
            f"data.path: {path} has {len(pools)} labels with two texts or more in the {split} "
            f"split, and an episode needs {max(count, 1)}; lower labels, or change heldout"
        )
    if count > chunks * examples:
        raise UserError(
            f"data.path: {chunks} chunks of {examples} examples cannot show each of {count} labels "
            f"of {path}; raise chunks or examples, or set labels to {chunks * examples} or less"
        )
    return (
        _episode(pools, count, chunks, examples, questions, f"ttl-{split}-{seed}-{number}", path)
        for number in range(episodes)
    )


def _episode(
    pools: Pools, count: int, chunks: int, examples: int, questions: int, name: str, path: Paths
) -> EpisodeRow:
    rng = random.Random(name)
    # In random order, so that a label's number tells nothing.
    chosen = rng.sample(list(pools), count)
    numbers = {label: number for number, label in enumerate(chosen)}
    texts = {label: rng.sample(pools[label], len(pools[label])) for label in chosen}
    # The first text of each label is shown and its last may be asked; the rest goes either way.
    shown = [(texts[label][0], label) for label in chosen]
    rest = [(text, label) for label in chosen for text in texts[label][1:-1]]
    rng.shuffle(rest)
    need = chunks * examples - count
    shown += rest[:need]
    asked = [(texts[label][-1], label) for label in chosen] + rest[need:]
    if need > len(rest) or questions > len(asked):
        have = len(rest) + 2 * count
        raise UserError(
            f"data.path: the {count} labels drawn from {path} have {have} texts in this split, and "
            f"an episode needs {chunks * examples} to show and {questions} to ask; lower chunks, "
            "examples or questions, or raise labels"
        )
    rng.shuffle(shown)
    rng.shuffle(asked)
    parts = [shown[start : start + examples] for start in range(0, len(shown), examples)]
    return EpisodeRow(
        id=name,
        source="ttl",
        chunks=tuple("\n".join(f"{t} -> label {numbers[y]}" for t, y in pairs) for pairs in parts),
        questions=tuple(
            Question(
                q=f"Which label has: {text}",
                answers=(str(numbers[label]),),
                type="test_time_learning",
                evidence=tuple(i for i, pairs in enumerate(parts) if label in dict(pairs).values()),
            )
            for text, label in asked[:questions]
        ),
        metric="number",
    )


def _read(path: Paths, fine: bool) -> Pools:
    """The texts of each label, in the order of the file."""
    label_of: dict[str, str] = {}
    mixed: set[str] = set()
    for file in files(path):
        for text, label in _csv(file) if file.suffix == ".csv" else _trec(file, fine):
            if label_of.setdefault(text, label) != label:
                mixed.add(text)
    pools: Pools = {}
    for text, label in label_of.items():
        if text not in mixed:
            pools.setdefault(label, []).append(text)
    return pools


def _csv(path: Path) -> Iterator[tuple[str, str]]:
    for number, (where, fields) in enumerate(rows(CsvSource([path], {}, ","))):
        key = "category" if "category" in fields else "label"
        if number == 0 and not {"text", key} <= fields.keys():
            raise UserError(
                f"data.path: {path} has the columns {', '.join(fields)}; a file of labelled texts "
                f"begins with the line {' or '.join(_HEADERS)}, or is a TREC .label file"
            )
        text, label = " ".join(fields["text"].split()), fields[key].strip()
        if not text or not label:
            raise FormatError(f"{where}: {'label' if text else 'text'} is blank; needs both")
        yield text, label


def _trec(path: Path, fine: bool) -> Iterator[tuple[str, str]]:
    with path.open(encoding="latin-1") as file:
        for number, line in enumerate(file, 1):
            match = _TREC.fullmatch(line.strip())
            if match is None and number == 1:
                raise UserError(
                    f"data.path: {path} is no TREC file, its first line is {line.strip()[:60]!r}; "
                    "needs lines such as 'NUM:date When was it ?', "
                    f"or a .csv file that begins with {' or '.join(_HEADERS)}"
                )
            if match is None:
                raise FormatError(f"{path}:{number}: no line such as 'NUM:date When was it ?'")
            yield " ".join(match[3].split()), f"{match[1]}:{match[2]}" if fine else match[1]
