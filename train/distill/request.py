"""What `mnemic distill collect` was asked for, checked before anything heavy loads."""

import hashlib
from argparse import Namespace
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mnemic.models.memory.op_prompts import OPERATIONS
from mnemic.train.arguments import numbers, one_of, words
from mnemic.train.data.formats import FormatError
from mnemic.train.data.memory.episode import EpisodeRow
from mnemic.train.data.memory.kvstream import episode
from mnemic.train.data.memory.operations_rows import STREAM
from mnemic.train.data.memory.reading import MIN_CHUNK, files
from mnemic.train.distill.journal import FORMAT
from mnemic.train.distill.replay import ANSWER_K, K, needed
from mnemic.train.errors import RecipeError, UserError
from mnemic.train.eval_memory import fewer
from mnemic.train.recipe.describe import closest

SUITES = ("kvstream", "locomo", "jsonl")
LOCAL = ("gold", "smollm2-135m")
EPISODES = 64
"""Of kvstream, where the number is not given."""


@dataclass(frozen=True)
class Request:
    """The checked arguments of a collection."""

    out: Path
    teacher: str
    model: str | None
    suite: str
    path: str | None
    conversations: list[int] | None
    episodes: int | None
    seed: int
    chunk: int
    questions: int | None
    operations: list[str]
    concurrency: int
    rate: float | None
    timeout: float
    retries: int
    retry_failed: bool

    @property
    def is_endpoint(self) -> bool:
        return self.teacher.startswith(("http://", "https://"))

    def settings(self) -> dict[str, Any]:
        """What collect.json keeps."""
        from importlib.metadata import version

        return {
            "format": FORMAT, "teacher": self.teacher, "teacher_model": self.model,
            "suite": self.suite, "path": self.path, "data": self._fingerprint(),
            "conversations": self.conversations, "seed": self.seed, "chunk": self.chunk,
            "questions": self.questions, "k": K, "answer_k": ANSWER_K,
            "episodes": self.episodes, "operations": self.operations,
            "versions": {"mnemic": version("mnemic")},
        }  # fmt: skip

    def rows(self) -> list[EpisodeRow]:
        """The episodes. Raises `UserError` for what is wrong with a file."""
        if self.path is None:
            count = EPISODES if self.episodes is None else self.episodes
            rows = [episode(STREAM, "train", index, self.seed) for index in range(count)]
        else:
            try:
                rows = list(islice(self._load(self.path), self.episodes))
            except (UserError, FormatError, ValueError) as error:
                raise UserError(f"--path: {str(error).removeprefix('data.path: ')}") from None
        if not rows:
            raise UserError(f"--path {self.path}: holds no episodes")
        ids = [row.id for row in rows]
        twin = next((id for id in ids if ids.count(id) > 1), None)
        if twin is not None:
            raise UserError(f"--path {self.path}: two episodes have the id {twin!r}; name them")
        return [fewer(row, self.questions) for row in rows]

    def _load(self, path: str) -> Any:
        from mnemic.train.data.memory.sources import jsonl, locomo

        if self.suite == "jsonl":
            return jsonl(path)
        return locomo(path, self.conversations, self.chunk)

    def _fingerprint(self) -> str | None:
        """Of the data: a file that was edited is another collection."""
        if self.path is None:
            return None
        digest = hashlib.sha256()
        try:
            found = files(self.path)
        except UserError as error:
            raise UserError(f"--path: {str(error).removeprefix('data.path: ')}") from None
        for file in found:
            digest.update(file.read_bytes())
        return digest.hexdigest()


def check(args: Namespace) -> Request:
    """A mistake is a `RecipeError`."""
    suite = one_of("--suite", args.suite, SUITES)
    if suite == "kvstream" and args.path:
        raise RecipeError("--path: kvstream is generated; give another --suite for a file")
    if suite != "kvstream" and not args.path:
        raise RecipeError(f"--suite {suite}: needs its file; add --path FILE")
    for name, value, least in (
        ("--conversations", args.conversations, None), ("--chunk", args.chunk, MIN_CHUNK),
    ):  # fmt: skip
        if value is not None and suite != "locomo":
            raise RecipeError(f"{name}: is for --suite locomo, not {suite}")
        if value is not None and least is not None and value < least:
            raise RecipeError(f"{name}: must be {least} or more, got {value}")
    _check_teacher(args.teacher, args.teacher_model)
    for name, value in (
        ("--episodes", args.episodes), ("--questions", args.questions),
        ("--concurrency", args.concurrency),
    ):  # fmt: skip
        if value is not None and value < 1:
            raise RecipeError(f"{name}: must be 1 or more, got {value}")
    for name, value, fits in (
        ("--rate", args.rate, _above_zero), ("--timeout", args.timeout, _above_zero),
        ("--retries", args.retries, _not_negative),
    ):  # fmt: skip
        if value is not None and not fits(value):
            raise RecipeError(f"{name}: must be {fits.__doc__}, got {value:g}")
    given = args.operations if args.operations is not None else ",".join(OPERATIONS)
    names = words(given)
    if not names:
        raise RecipeError(f"--operations: names none; there are {', '.join(OPERATIONS)}")
    operations = [one_of("--operations", name, OPERATIONS) for name in names]
    return Request(
        Path(args.out), args.teacher, args.teacher_model, suite, args.path,
        numbers("--conversations", args.conversations, 0) or None, args.episodes, args.seed,
        2000 if args.chunk is None else args.chunk, args.questions, needed(operations),
        args.concurrency, args.rate, args.timeout, args.retries, args.retry_failed,
    )  # fmt: skip


def _above_zero(value: float) -> bool:
    """above 0"""
    return 0 < value < float("inf")


def _not_negative(value: float) -> bool:
    """0 or more"""
    return value >= 0


def _check_teacher(name: str, model: str | None) -> None:
    url = name.startswith(("http://", "https://"))
    if model and not url:
        raise RecipeError("--teacher-model: is for a --teacher that is an http address")
    if url and not model:
        raise RecipeError(
            "--teacher: an endpoint needs the name of its model; add --teacher-model NAME"
        )
    # A name with a slash may be one of the hub's.
    if not (url or name in LOCAL or "/" in name or Path(name).is_dir()):
        raise RecipeError(
            f"--teacher: {name!r} is neither {', '.join(LOCAL)}, nor a folder, nor an http address"
            + closest(name, LOCAL)
        )
