"""`mnemic eval memory`: a memory manager over held-out streams, beside memories made without one.

Arguments to report; eval_target.py loads what is evaluated, rollout/suite.py plays it.
"""

import json
import logging
import math
import random
from argparse import Namespace
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from mnemic.train.arguments import numbers, one_of, words
from mnemic.train.data.memory.episode import EpisodeRow
from mnemic.train.data.memory.kvstream import KvStream
from mnemic.train.errors import RecipeError, UserError
from mnemic.train.eval_target import Target, answerer_of, open_target

log = logging.getLogger("mnemic")

SUITES = ("kvstream", "locomo", "longmemeval", "memoryagentbench", "squad", "ttl", "jsonl")
SEEDED = ("kvstream", "squad", "ttl")
"""Suites that draw their episodes."""
CHUNKED = ("locomo", "longmemeval", "memoryagentbench")
"""Suites whose streams are cut here."""
FIRST_SEED = 1000
"""Past the seeds of recipes: no checkpoint was chosen by these episodes."""
_LEAST = 16
"""Episodes of the longest streams of a length curve, where there are as many at all."""
_BATCH = 64


@dataclass(frozen=True)
class Request:
    """The checked arguments."""

    suite: str
    path: str | None
    episodes: int
    seeds: list[int]
    conversations: list[int] | None
    lengths: list[int]
    baselines: list[str]
    questions: int | None = None
    chunk: int | None = None


def eval_memory(args: Namespace) -> int:
    """The command; its report goes to standard output and to --json and --plot."""
    from mnemic.train.eval_bank import is_bank

    if is_bank(args.target):
        from mnemic.train.eval_pipeline import eval_pipeline

        return eval_pipeline(args)
    from mnemic.train.eval_pipeline import refuse_options

    refuse_options(args)
    request, notes = check(args)
    for file in filter(None, (args.json, args.plot)):
        if not Path(file).resolve().parent.is_dir():
            raise UserError(f"{Path(file).parent}: no such folder")
    from mnemic.train.rollout.report import draw, need_matplotlib, show, write

    if args.plot:
        need_matplotlib()
    answerer_part = answerer_of(args.answerer, args.answerer_model)
    target = open_target(args.target, args.set or [])
    part = answerer_part or target.answerer
    from mnemic.models.memory.endpoint import EndpointError
    from mnemic.train.rollout.build import build_answerer

    try:
        answerer = build_answerer(part, target.model, target.tokenizer, target.folder)
    except (UserError, ValueError) as error:
        reason = str(error).removeprefix("objective.answerer.path: ")
        raise UserError(f"--answerer: {reason}") from None
    if part.kind == "rule" and target.memory.store == "text":
        notes.append("the rule reader reads entries, and a memory of kind text has none")
    try:
        report = evaluate(target, request, answerer)
    except EndpointError as error:
        raise UserError(f"--answerer: {error}") from None
    report.notes[:0] = notes
    report.env |= {"target": args.target, "answerer": _label(part)}
    show(report)
    if args.json:
        write(report, Path(args.json))
        print(f"{args.json}: written")
    if args.plot:
        draw(report, Path(args.plot))
        print(f"{args.plot}: written")
    return 0


def check(args: Namespace) -> tuple[Request, list[str]]:
    """The request, and notes on what has no effect; a mistake is a `RecipeError`."""
    from mnemic.train.rollout.baselines import BASELINES

    notes: list[str] = []
    suite = one_of("--suite", args.suite, SUITES)
    if suite == "kvstream" and args.path:
        raise RecipeError("--path: kvstream is generated; give another --suite for a file")
    if suite != "kvstream" and not args.path:
        raise RecipeError(f"--suite {suite}: needs its file; add --path FILE")
    if args.conversations and suite != "locomo":
        raise RecipeError(f"--conversations: is for --suite locomo, not {suite}")
    if args.lengths and suite != "kvstream":
        raise RecipeError(f"--lengths: a file has the length it has; leave it out with {suite}")
    if args.chunk and suite not in CHUNKED:
        raise RecipeError(f"--chunk: is for {', '.join(CHUNKED)}; {suite} has chunks of its own")
    for name, value in (
        ("--episodes", args.episodes), ("--seeds", args.seeds), ("--questions", args.questions),
        ("--chunk", args.chunk),
    ):  # fmt: skip
        if value is not None and value < 1:
            raise RecipeError(f"{name}: must be 1 or more, got {value}")
    seeds = 3 if args.seeds is None else args.seeds
    if suite not in SEEDED:
        if args.seeds is not None:
            notes.append(f"--seeds has no effect: {suite} is one list of episodes, read greedily")
        seeds = 1
    chosen = list(BASELINES) if args.baselines is None else words(args.baselines)
    conversations = numbers("--conversations", args.conversations, 0)
    request = Request(
        suite, args.path, 256 if args.episodes is None else args.episodes,
        [FIRST_SEED + i for i in range(seeds)], conversations or None,
        sorted(set(numbers("--lengths", args.lengths, 1))),
        [one_of("--baselines", name, BASELINES) for name in chosen],
        args.questions, args.chunk,
    )  # fmt: skip
    return request, notes


def rows_of(request: Request, stream: KvStream, seed: int, count: int) -> list[EpisodeRow]:
    """At most `count` held-out episodes of a suite; what is wrong with a file is a `UserError`."""
    from mnemic.train.data.memory.kvstream import episode
    from mnemic.train.data.memory.sources import LOADERS

    if request.suite == "kvstream":
        return [episode(stream, "heldout", index, seed) for index in range(count)]
    options: dict[str, Any] = {}
    if request.suite in SEEDED:
        options = {"split": "heldout", "seed": seed}
    if request.suite == "ttl":
        options["episodes"] = count
    if request.suite == "locomo":
        options["conversations"] = request.conversations
    if request.chunk:
        options["chunk_chars"] = request.chunk
    try:
        found = list(islice(LOADERS[request.suite](request.path, **options), count))
    except (UserError, ValueError) as error:
        raise UserError(f"--path: {str(error).removeprefix('data.path: ')}") from None
    if not found:
        raise UserError(f"--path {request.path}: holds no episodes")
    return [fewer(row, request.questions) for row in found]


def fewer(row: EpisodeRow, count: int | None) -> EpisodeRow:
    """The row with at most `count` of its questions, drawn by its id: the same for all readers."""
    if count is None or len(row.questions) <= count:
        return row
    chosen = sorted(random.Random(row.id).sample(range(len(row.questions)), count))
    return replace(row, questions=tuple(row.questions[i] for i in chosen))


def evaluate(target: Target, request: Request, answerer: Any) -> Any:
    """Manager and baselines on all seeds, and along the lengths; a `report.Report`."""
    from mnemic.train.rollout.play import ModelGenerator
    from mnemic.train.rollout.report import Report
    from mnemic.train.rollout.suite import Manager

    generator = ModelGenerator(
        target.model, target.tokenizer, max_new_tokens=target.memory.max_new_tokens,
        batch_size=_BATCH,
    )  # fmt: skip
    context = getattr(target.model.config, "max_position_embeddings", None)
    manager = Manager(target.memory, target.tokenizer, generator, context)
    report = Report(target.name, request.suite)
    report.env = {"episodes": request.episodes, "seeds": request.seeds, "path": request.path}
    for length in [1, *(length for length in request.lengths if length > 1)]:
        _part(report, target, request, manager, answerer, length)
    return report


def _part(
    report: Any, target: Target, request: Request, manager: Any, answerer: Any, length: int
) -> None:
    """Add the rows of one length."""
    from mnemic.train.rollout.baselines import read_baseline
    from mnemic.train.rollout.suite import Cost, figures, read_all

    stream = replace(target.stream, n_chunks=target.stream.n_chunks * length)
    # As many chunks at each length, down to a number of episodes that still says something.
    count = max(min(_LEAST, request.episodes), math.ceil(request.episodes / length))
    rows = [rows_of(request, stream, seed, count) for seed in request.seeds]
    log.info("%s x%d: %d episodes", request.suite, length, sum(map(len, rows)))
    cost, by_seed = Cost(), []
    for own in rows:
        readings, spent = read_all(own, manager, answerer)
        cost = Cost(cost.tokens + spent.tokens, cost.seconds + spent.seconds)
        by_seed.append(readings)
    report.add("manager", length, figures(by_seed, cost))
    for name in request.baselines:
        found = [read_baseline(name, own, manager.memory, answerer) for own in rows]
        report.note(note for _, notes in found for note in notes)
        if found[0][0]:
            report.add(name, length, figures([readings for readings, _ in found]))


def _label(part: Any) -> str:
    values = json.loads(part.model_dump_json(include={"kind", "path", "base_url", "model"}))
    return " ".join(str(v) for v in values.values())
