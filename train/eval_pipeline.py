"""`mnemic eval memory` of an adapter bank: the pipeline of extraction, update and answers by its
experts, beside the same model without them and other systems.

Arguments to report; eval_bank.py loads, rollout/pipeline_suite.py plays and measures.
"""

import hashlib
import json
import logging
from argparse import Namespace
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mnemic.models.memory.op_prompts import EXTRACT, GENERATE, OPERATIONS, UPDATE
from mnemic.train.arguments import numbers, one_of, words
from mnemic.train.data.memory.episode import EpisodeRow, to_row
from mnemic.train.errors import RecipeError, UserError
from mnemic.train.eval_bank import SHARED, BankTarget, Source, find, find_shared, load, need
from mnemic.train.eval_memory import Request, check, rows_of

log = logging.getLogger("mnemic")

SYSTEMS = ("experts", "base", "shared", "full", "rag")
OPTIONS = (
    "systems", "base", "k", "answer_k", "max_new_tokens", "batch_size", "judge", "judge_model",
    "resume",
)  # fmt: skip
"""Options of a bank alone."""
_OTHERS = ("answerer", "answerer_model", "lengths", "baselines", "plot", "set")
_EPISODES = 16
_NEW: dict[str, int] = {EXTRACT: 256, UPDATE: 160, GENERATE: 24}


@dataclass(frozen=True)
class Plan:
    """The checked arguments."""

    request: Request
    systems: dict[str, str]
    """Name -> the folder of a shared adapter, or nothing."""
    settings: dict[str, int]
    new: dict[str, int]
    batch_size: int
    judge: tuple[str, str] | None = None


def refuse_options(args: Namespace) -> None:
    """`RecipeError` for an option of banks where the target is none."""
    for name in OPTIONS:
        if getattr(args, name, None) not in (None, False):
            raise RecipeError(
                f"--{name.replace('_', '-')}: is for an adapter bank, and {args.target} is none"
            )


def eval_pipeline(args: Namespace) -> int:
    """The command; its report goes to standard output and to --json."""
    plan, notes = plan_of(args)
    if args.json and not Path(args.json).resolve().parent.is_dir():
        raise UserError(f"{Path(args.json).parent}: no such folder")
    source = find(args.target, args.base)
    shared = find_shared(plan.systems["shared"], source) if "shared" in plan.systems else None
    if "experts" in plan.systems:
        need(source)
    from mnemic.train.data.memory.operations_rows import STREAM

    request = plan.request
    rows = [
        row for seed in request.seeds for row in rows_of(request, STREAM, seed, request.episodes)
    ]
    kept = _kept(args.json) if args.resume else {}
    from mnemic.models.memory.endpoint import EndpointError

    target = load(source, shared)
    try:
        report = evaluate(args, plan, target, source, rows, kept, notes)
    except EndpointError as error:
        raise UserError(f"--judge: {error}") from None
    from mnemic.train.rollout.pipeline_report import show

    show(report)
    if args.json:
        print(f"{args.json}: written")
    return 0


def plan_of(args: Namespace) -> tuple[Plan, list[str]]:
    """What is asked for, and notes on what has no effect; a mistake is a `RecipeError`."""
    for name in _OTHERS:
        if getattr(args, name, None):
            raise RecipeError(
                f"--{name.replace('_', '-')}: has no effect on an adapter bank, whose pipeline "
                "answers itself; leave it out"
            )
    filled = {"episodes": _EPISODES if args.episodes is None else args.episodes}
    if args.suite == "kvstream" and args.seeds is None:
        filled["seeds"] = 1
    request, notes = check(Namespace(**{**vars(args), **filled}))
    systems: dict[str, str] = {}
    for word in words(args.systems or "experts,base"):
        name, _, folder = word.partition("=")
        one_of("--systems", name, SYSTEMS)
        if (name == "shared") != bool(folder):
            raise RecipeError(f"--systems: {word!r}; only shared has a folder: shared=FOLDER")
        systems[name] = folder
    if not systems:
        raise RecipeError(f"--systems: names none of {', '.join(SYSTEMS)}")
    # First, so that the others' differences to it are known as they come.
    systems = dict(sorted(systems.items(), key=lambda item: item[0] != "experts"))
    settings = {"k": args.k or 5, "answer_k": args.answer_k or 10}
    for name, value in (("--k", args.k), ("--answer-k", args.answer_k),
                        ("--batch-size", args.batch_size)):  # fmt: skip
        if value is not None and value < 1:
            raise RecipeError(f"{name}: must be 1 or more, got {value}")
    new = {**_NEW}
    if args.max_new_tokens:
        given = numbers("--max-new-tokens", args.max_new_tokens, 1)
        if len(given) != len(OPERATIONS):
            raise RecipeError("--max-new-tokens: needs EXTRACT,UPDATE,GENERATE, such as 256,160,24")
        new = {op: count for op, count in zip(OPERATIONS, given, strict=True)}
    if args.resume and not args.json:
        raise RecipeError("--resume: goes on from --json FILE; add it")
    judge = None
    if args.judge or args.judge_model:
        if not (args.judge and args.judge_model):
            raise RecipeError("--judge URL and --judge-model NAME go together; add the other one")
        judge = (args.judge, args.judge_model)
    return Plan(request, systems, settings, new, args.batch_size or 16, judge), notes


def evaluate(
    args: Namespace, plan: Plan, target: BankTarget, source: Source, rows: list[EpisodeRow],
    kept: dict[str, Any], notes: list[str],
) -> Any:  # fmt: skip
    """All systems, one after the other; --json is written after each. A `PipelineReport`."""
    from mnemic.train.rollout.pipeline_report import PipelineReport, write
    from mnemic.train.rollout.pipeline_suite import Outcome

    report = PipelineReport(args.target, plan.request.suite, rows, notes=notes)
    report.env = {
        "path": plan.request.path, "seeds": plan.request.seeds, "model": source.model,
        "conversations": plan.request.conversations, "max_new_tokens": plan.new,
        "batch_size": plan.batch_size, "judge": plan.judge, **plan.settings,
    }  # fmt: skip
    data = hashlib.sha256(json.dumps([to_row(row) for row in rows]).encode()).hexdigest()[:16]
    for name in plan.systems:
        names = adapters_of(name, target)
        made_with = {
            "data": data, "model": source.model, "seed": source.seed, **plan.settings,
            "max_new_tokens": plan.new,
            "adapters": {op: target.stamp(n) if n else None for op, n in names.items()},
        }  # fmt: skip
        old = kept.get(name)
        # Through JSON: what was read from a file has lists where this has tuples.
        if old is not None and old.get("made_with") == json.loads(json.dumps(made_with)):
            log.info("%s: kept from %s", name, args.json)
            outcome = Outcome.from_json({k: v for k, v in old.items() if k != "made_with"})
        else:
            if old is not None:
                report.notes.append(f"{name}: {args.json} was made otherwise; played again")
            outcome = _play(name, plan, target, names, rows)
        if plan.judge is not None:
            _judge(plan.judge, outcome, rows)
        report.add(outcome, made_with, target.bytes(names))
        if args.json:
            write(report, Path(args.json))
    return report


def adapters_of(system: str, target: BankTarget) -> dict[str, str | None]:
    """Which adapter does each operation; None is the base."""
    if system == "experts":
        return {op: op for op in OPERATIONS}
    if system == "shared":
        return dict.fromkeys(OPERATIONS, SHARED)
    found: dict[str, str | None] = dict.fromkeys(OPERATIONS)
    if system == "rag" and GENERATE in target.sources:
        found[GENERATE] = GENERATE
    return found


def _play(
    name: str, plan: Plan, target: BankTarget, names: dict[str, str | None],
    rows: list[EpisodeRow],
) -> Any:  # fmt: skip
    from mnemic.models.memory.op_writer import ModelWriter
    from mnemic.train.rollout.pipeline_suite import Settings, play, play_full, play_rag

    log.info("%s: %d streams, %d chunks", name, len(rows), sum(len(row.chunks) for row in rows))
    # A prompt that fills the context: one at a time, or its cache takes gigabytes.
    size = 1 if name == "full" else plan.batch_size
    writer = ModelWriter(
        target.bank, target.tokenizer, max_new_tokens=plan.new, batch_size=size,
        **target.adapters(names),
    )  # fmt: skip
    if name == "full":
        return play_full(rows, writer)
    if name == "rag":
        outcome = play_rag(rows, writer, target.tokenizer)
        by = names[GENERATE] or "the base"
        return replace(outcome, notes=[*outcome.notes, f"rag: answered by {by}"])

    def progress(done: int, rounds: int) -> None:
        if done % 10 == 0 or done == rounds:
            log.info("%s: update %d of %d", name, done, rounds)

    return play(name, rows, writer, target.tokenizer, Settings(**plan.settings), progress)


def _judge(who: tuple[str, str], outcome: Any, rows: list[EpisodeRow]) -> None:
    from mnemic.models.memory.endpoint import Endpoint
    from mnemic.models.smollm2 import cache_root
    from mnemic.train.rollout.judge import judge

    cache_root().mkdir(parents=True, exist_ok=True)
    try:
        endpoint = Endpoint(*who, cache=cache_root() / "judge.sqlite", max_tokens=256)
    except ValueError as error:
        raise RecipeError(f"--judge: {error}") from None
    outcome.verdicts, unread = judge(endpoint, rows, outcome.answers)
    if unread:
        outcome.notes.append(f"{outcome.name}: {unread} replies of the judge held no verdict")


def _kept(file: str) -> dict[str, Any]:
    """The samples of an earlier report; none where there is no file yet."""
    path = Path(file)
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))["samples"]
        if not isinstance(found, dict):
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"--resume: {file} is no report of an adapter bank; give another --json file, or leave "
            "--resume out to write it anew"
        ) from None
    return found
