"""`mnemic distill collect`: a teacher's replies over whole episodes, kept one by one.

What is on disk is not asked again: a start that finds replies plays the episodes with them and goes
on where they end. A reply counts for a key only while its prompt is the one asked: what a repeated
question changed further on is asked anew, and the later line holds.
"""

import hashlib
import json
import logging
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mnemic.models.memory.op_prompts import OPERATIONS, Messages
from mnemic.train.distill.gold import gold_of
from mnemic.train.distill.journal import Appender, CollectFolder
from mnemic.train.distill.replay import play
from mnemic.train.distill.request import Request, check
from mnemic.train.distill.teachers import (
    Answer,
    Ask,
    GoldTeacher,
    ModelTeacher,
    Teacher,
    endpoint_teacher,
)
from mnemic.train.errors import UserError

log = logging.getLogger("mnemic")

GIVE_UP = 8
"""Failures in a row from which the teacher is taken to be gone."""


@dataclass
class Counts:
    """By operation: records there are, those of this start, and those that failed."""

    records: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)


class Collector:
    """Asks the teacher what raw.jsonl does not answer yet, and appends it, in the order of asking.

    Failures are held back until another question succeeds: those of a teacher that is gone are
    asked again by the next start, those of a prompt that it cannot answer are records.
    """

    def __init__(
        self, folder: CollectFolder, teacher: Teacher, *, retry_failed: bool = False
    ) -> None:
        self.teacher, self.counts = teacher, Counts()
        self.split_key = ""
        self._known: dict[str, tuple[str, Answer]] = {}
        for record in folder.records():
            error = record.get("error")
            if error is not None and retry_failed:
                self._known.pop(record["key"], None)
                continue
            answer = Answer(record["reply"], bool(record.get("cut")), error)
            self._known[record["key"]] = _digest(record["prompt"]), answer
        self._file = Appender(folder.raw)
        self._failures: list[dict[str, Any]] = []

    def ask(self, operation: str, asks: Sequence[Ask]) -> list[Answer]:
        """One answer to each. `UserError` where the teacher fails `GIVE_UP` times in a row."""
        new = [ask for ask in asks if self._find(ask) is None]
        for start in range(0, len(new), self.teacher.batch):
            batch = new[start : start + self.teacher.batch]
            self._keep(batch, self.teacher.answer(operation, batch))
        answers = [self._find(ask) for ask in asks]
        found = [answer for answer in answers if answer is not None]
        assert len(found) == len(asks)
        self.counts.records[operation] += len(found)
        self.counts.failed[operation] += sum(answer.error is not None for answer in found)
        return found

    def close(self) -> None:
        self._file.close()

    def flush(self) -> None:
        """Keep what is held back."""
        self._file.append(self._failures)
        self._failures = []

    def _find(self, ask: Ask) -> Answer | None:
        prompt, answer = self._known.get(ask.key, ("", None))
        return answer if answer is not None and prompt == _digest(ask.prompt) else None

    def _keep(self, asks: Sequence[Ask], answers: Sequence[Answer]) -> None:
        lines: list[dict[str, Any]] = []
        for ask, answer in zip(asks, answers, strict=True):
            record = self._record(ask, answer)
            self._known[ask.key] = _digest(ask.prompt), answer
            self.counts.asked[ask.operation] += 1
            if answer.error is None:
                lines += [*self._failures, record]
                self._failures = []
                continue
            log.warning("%s: no reply: %s", ask.key, answer.error)
            self._failures.append(record)
            if len(self._failures) >= GIVE_UP:
                self._file.append(lines)
                raise UserError(
                    f"--teacher: {GIVE_UP} requests in a row failed, the last one so: "
                    f"{answer.error}; all replies before are kept: run the same command again "
                    "when the teacher answers"
                )
        self._file.append(lines)

    def _record(self, ask: Ask, answer: Answer) -> dict[str, Any]:
        record = {
            "key": ask.key, "operation": ask.operation, "prompt": ask.prompt,
            "reply": answer.reply, "cut": answer.cut, "teacher": self.teacher.name,
            "target_source": self.teacher.source, "split_key": self.split_key,
            "context": ask.context,
        }  # fmt: skip
        return record if answer.error is None else {**record, "error": answer.error}


def collect(args: Namespace) -> int:
    """The command; its summary goes to standard output."""
    request = check(args)
    rows = request.rows()
    settings = request.settings()
    try:
        request.out.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"{request.out}: is a file; give a folder") from None
    folder = CollectFolder(request.out)
    with folder.claimed():
        folder.begin(settings)
        teacher = make_teacher(request, folder)
        start = time.perf_counter()
        collector = Collector(folder, teacher, retry_failed=request.retry_failed)
        try:
            for number, row in enumerate(rows, 1):
                collector.split_key = row.id
                gold = gold_of(row) if teacher.source == "gold" else None
                play(row, collector.ask, teacher.room, gold, request.operations)
                log.info("%s: %d of %d episodes", row.id, number, len(rows))
            collector.flush()
        finally:
            collector.close()
            show(collector.counts, teacher, time.perf_counter() - start)
    print(f"{folder.raw}: complete; next:  mnemic distill clean {request.out}")
    return 0


def make_teacher(request: Request, folder: CollectFolder) -> Teacher:
    if request.teacher == "gold":
        return GoldTeacher()
    if request.is_endpoint:
        assert request.model is not None
        return endpoint_teacher(
            request.teacher, request.model, folder.answers, concurrency=request.concurrency,
            rate=request.rate, timeout=request.timeout, retries=request.retries,
        )  # fmt: skip
    path = request.teacher
    if path == "smollm2-135m":
        from mnemic.train.build import smollm2_folder

        path = smollm2_folder()
    return ModelTeacher(request.teacher, path, request.concurrency)


def show(counts: Counts, teacher: Teacher, seconds: float) -> None:
    """Records, failures, and what they took."""
    print(f"{'operation':<14}{'records':>9}{'new':>9}{'failed':>9}")
    for operation in OPERATIONS:
        if counts.records[operation]:
            print(
                f"{operation:<14}{counts.records[operation]:>9}{counts.asked[operation]:>9}"
                f"{counts.failed[operation]:>9}"
            )
    spent = teacher.spent()
    line = f"{seconds:.1f} s"
    if spent.new_tokens:
        line += f", {spent.prompt_tokens} prompt tokens, {spent.new_tokens} new ones"
    if spent.calls or spent.cached:
        line += f", {spent.calls} requests, {spent.cached} replies from the cache"
    print(line)
    if counts.failed.total():
        print("failed ones stay out of clean rows; --retry-failed asks them again")


def _digest(prompt: Messages) -> str:
    return hashlib.sha256(json.dumps(prompt).encode()).hexdigest()
