"""`mnemic distill clean`: the replies that are fit to learn from, as training rows, and a count of
the others by rule.

    clean/mem_extract.jsonl ...   {"prompt", "completion"} as messages, "operation", "key",
                                  "teacher", "target_source", "split_key"
    clean/dropped.jsonl           {"key", "operation", "rule", "detail"} of each record left out
    clean/report.json             counts by operation and rule

Targets are written anew (op_prompts, `Lines`), so what an expert learns is one form, whatever the
teacher wrote around it. A record counts under the first of `RULES` that it breaks; single facts and
operations taken out of rows that stay are counted beside, as repairs.
"""

import json
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mnemic.models.memory.op_prompts import OPERATIONS
from mnemic.models.memory.store import count_pieces
from mnemic.train.checkpoint import write_atomic
from mnemic.train.distill import rules
from mnemic.train.distill.journal import CollectFolder
from mnemic.train.distill.rules import Limits, Verdict
from mnemic.train.distill.targets import target
from mnemic.train.errors import RecipeError, UserError

WHOLE: dict[str, Callable[[dict[str, Any]], str | None]] = {
    "failed": rules.failed,
    "refused": rules.refused,
    "cut": rules.cut,
    "empty": rules.empty,
    "repeats": rules.loops,
}
"""Rules that look at a reply as a text, in this order."""

RULES = {
    "failed": "the teacher gave no reply",
    "refused": "it would not do it",
    "cut": "ran into the token limit",
    "empty": "no text",
    "repeats": "loops, or one reply to many prompts",
    "unparsable": "no list of facts, no operation",
    "long": "over a length cap",
    "unsupported": "no content word of the source",
    "event": "an operation the update has not",
    "ids": "an id that was not shown, or twice",
    "existing": "adds what is there",
    "unchanged": "replaces a text by itself",
    "denied": "none, though the memories tell",
    "wrong": "not the gold answer",
    "unborne": "an answer that no memory bears out",
    "duplicate": "the prompt of an earlier row",
    "beside": "words around what was asked for",
}
"""All rules, as the report lists them."""


def judge(record: dict[str, Any], parrots: dict[str, str], limits: Limits) -> Verdict:
    """The record's target, or the first rule that it breaks."""
    for name, rule in WHOLE.items():
        detail = rule(record)
        if detail is not None:
            return Verdict(rule=name, detail=detail)
    if record["key"] in parrots:
        return Verdict(rule="repeats", detail=parrots[record["key"]])
    found = target(record, limits)
    if found.target is not None and limits.max_tokens is not None:
        texts = [*(message["content"] for message in record["prompt"]), found.target]
        size = sum(map(count_pieces, texts))
        if size > limits.max_tokens:
            return Verdict(rule="long", detail=f"{size} words and marks of prompt and target")
    return found


class Cleaned:
    """Rows and drops of a collection, in the order of its records."""

    def __init__(self, records: Iterable[dict[str, Any]], limits: Limits) -> None:
        # The last line of a key holds: it answers the prompt that was asked in the end.
        latest = list({record["key"]: record for record in records}.values())
        parrots = rules.parrots(latest)
        self.rows: dict[str, list[dict[str, Any]]] = {op: [] for op in OPERATIONS}
        self.dropped: list[dict[str, Any]] = []
        self.raw: Counter[str] = Counter()
        self.repaired: dict[str, Counter[str]] = {op: Counter() for op in OPERATIONS}
        seen: set[tuple[str, str]] = set()
        for record in latest:
            operation = record["operation"]
            self.raw[operation] += 1
            verdict = judge(record, parrots, limits)
            prompt = json.dumps(record["prompt"])
            if verdict.target is not None and limits.dedupe and (operation, prompt) in seen:
                verdict = Verdict(rule="duplicate", detail="its prompt has a row already")
            if verdict.target is None:
                self.dropped.append({
                    "key": record["key"], "operation": operation, "rule": verdict.rule,
                    "detail": verdict.detail,
                })  # fmt: skip
                continue
            seen.add((operation, prompt))
            self.repaired[operation] += verdict.repaired
            self.rows[operation].append(_row(record, verdict.target))

    def report(self, limits: Limits) -> dict[str, Any]:
        """Counts of records (raw, kept, dropped by rule) and of items taken out (repaired)."""
        drops = Counter((drop["operation"], drop["rule"]) for drop in self.dropped)
        return {
            "operations": {
                operation: {
                    "raw": self.raw[operation], "kept": len(self.rows[operation]),
                    "dropped": {r: drops[operation, r] for r in RULES if drops[operation, r]},
                    "repaired": {r: n for r in RULES if (n := self.repaired[operation][r])},
                }
                for operation in OPERATIONS
            },
            "limits": asdict(limits),
        }  # fmt: skip

    def write(self, folder: Path, limits: Limits) -> None:
        folder.mkdir(exist_ok=True)
        for operation in OPERATIONS:
            _write_rows(folder / f"{operation}.jsonl", self.rows[operation])
        _write_rows(folder / "dropped.jsonl", self.dropped)
        report = json.dumps(self.report(limits), indent=1) + "\n"
        write_atomic(folder / "report.json", report.encode())


def clean(args: Namespace) -> int:
    """The command; its table goes to standard output."""
    for name, value in (
        ("--max-tokens", args.max_tokens), ("--max-answer-words", args.max_answer_words),
    ):  # fmt: skip
        if value is not None and value < 1:
            raise RecipeError(f"{name}: must be 1 or more, got {value}")
    folder = CollectFolder(Path(args.out))
    folder.read_settings()
    limits = Limits(args.max_tokens, args.max_answer_words, args.dedupe)
    with folder.claimed():
        found = Cleaned(folder.records(), limits)
        if not found.raw:
            raise UserError(f"{folder.raw}: holds no record; run mnemic distill collect first")
        found.write(folder.clean, limits)
    show(found.report(limits))
    print(f"{folder.clean}: written")
    return 0


def show(report: dict[str, Any]) -> None:
    """Rule by operation: records dropped, and in brackets items taken out of rows that stay."""
    by_operation = report["operations"]
    print(f"{'':<14}" + "".join(f"{op:>16}" for op in OPERATIONS))
    for name in ("raw", "kept"):
        print(f"{name:<14}" + "".join(f"{by_operation[op][name]:>16}" for op in OPERATIONS))
    for rule, meaning in RULES.items():
        cells = []
        for op in OPERATIONS:
            lost, mended = (by_operation[op][kind].get(rule, 0) for kind in ("dropped", "repaired"))
            cells.append(f"{lost or '-'}" + (f" ({mended})" if mended else ""))
        if any(cell != "-" for cell in cells):
            print(f"{rule:<14}" + "".join(f"{c:>16}" for c in cells) + f"  {meaning}")
    if any(by_operation[op]["repaired"] for op in OPERATIONS):
        print("in brackets: facts and operations taken out of rows that stay")


def _row(record: dict[str, Any], text: str) -> dict[str, Any]:
    return {
        "prompt": record["prompt"], "completion": [{"role": "assistant", "content": text}],
        "operation": record["operation"], "key": record["key"], "teacher": record["teacher"],
        "target_source": record["target_source"], "split_key": record["split_key"],
    }  # fmt: skip


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    write_atomic(path, b"".join(json.dumps(row).encode() + b"\n" for row in rows))
