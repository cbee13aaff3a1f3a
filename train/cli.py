"""The `mnemic` command. Parsing and help import nothing heavy; each command imports what
it needs.
"""

import argparse
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable
from typing import NoReturn

from mnemic.train.errors import RecipeError, UserError
from mnemic.train.lazy_dynamo import put_off_dynamo
from mnemic.train.leave import leave

RECIPE_HELP = "a recipe file, or the name of a shipped recipe (mnemic recipes ls)"
OVERRIDES_HELP = "overrides such as optimizer.lr=1e-4 or adapters.kind=none; the last one wins"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="mnemic",
        description="Train language models in little memory, "
        "and train the memory of language models.",
        epilog="First run:  mnemic train quickstart",
    )
    top.add_argument("--version", action="store_true", help="print the version and exit")
    commands = top.add_subparsers(dest="command", metavar="COMMAND")

    def add(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")

    train = add("train", "train a recipe, or go on where its run folder stopped")
    validate = add("validate", "check a recipe and its data without training")
    plan = add("plan", "tell what a recipe will take: memory, disk, bytes of a step")
    for command in (train, validate, plan):
        command.add_argument("recipe", help=RECIPE_HELP)
        command.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES_HELP)
    for command in (train, plan):
        command.add_argument(
            "--low-memory", nargs="?", const="auto", metavar="SIZE",
            help="choose update, offload, batches and recomputation to fit into SIZE, such as "
            "1GiB; default: what is free (as loop.memory_budget)",
        )  # fmt: skip
    validate.add_argument("--show", action="store_true", help="print the resolved recipe")

    plan.add_argument("--json", action="store_true", help="print JSON, in bytes and seconds")
    plan.add_argument(
        "--length", metavar="N[,N...]", help="plan for rows of N tokens; several are compared"
    )
    plan.add_argument(
        "--disk", action="append", metavar="FOLDER",
        help="measure the disk of this folder instead of the offload's; may be given again",
    )  # fmt: skip
    plan.add_argument(
        "--tbw", type=float, default=600.0, help="terabytes that the disk may have written to it"
    )
    plan.add_argument(
        "--activations", action="store_true",
        help="count activations under each combination of techniques, and name the cheapest",
    )  # fmt: skip
    plan.add_argument(
        "--budget",
        metavar="SIZE",
        help="memory to fit into with --activations, such as 24GiB; default: what is free here",
    )

    recipes = add("recipes", "list or copy the shipped recipes")
    actions = recipes.add_subparsers(dest="action", metavar="ls|cp", required=True)
    actions.add_parser("ls", help="list them, with what each does")
    copy = actions.add_parser("cp", help="copy one to edit it")
    copy.add_argument("name")
    copy.add_argument("target", nargs="?", help="file or folder; default: here")

    schema = add("schema", "print the recipe's JSON Schema, for completion in editors")
    schema.add_argument("--out", help="write it to a file")

    export = add("export", "write a run's model as a plain HF or PEFT folder")
    export.add_argument("run", help="run folder")
    export.add_argument("target", help="folder to make")
    export.add_argument("--checkpoint", help="a folder of checkpoints/ instead of the result")
    export.add_argument(
        "--average", type=int, default=1, metavar="N", help="the mean of the newest N checkpoints"
    )
    export.add_argument("--merge", action="store_true", help="fold the adapters into the model")

    generate = add("generate", "answer a prompt with a run's model")
    generate.add_argument("run", help="run folder")
    generate.add_argument("prompt", nargs="*", help="prompts; without any, lines of standard input")
    generate.add_argument("--checkpoint", help="a folder of checkpoints/ instead of the result")
    generate.add_argument("--max-new-tokens", type=int, default=128)
    generate.add_argument("--base", action="store_true", help="answer without the adapters")
    generate.add_argument("--operation", metavar="NAME", help="which expert of a bank answers")

    _add_memory(add)
    _add_distill(add)
    _add_report(add)

    doctor = add("doctor", "tell versions, optional parts, disk speed, and what will not work")
    doctor.add_argument("path", nargs="?", default=".", help="where to measure the disk")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    return top


def _add_memory(add: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """`eval memory` and `memory show`."""
    evaluate = add("eval", "measure what was trained on held-out data")
    kinds = evaluate.add_subparsers(dest="kind", metavar="memory", required=True)
    text = "a memory manager over held-out streams, beside memories made without one"
    memory = kinds.add_parser("memory", help=text, description=text[0].upper() + text[1:] + ".")
    memory.add_argument(
        "target",
        help="run folder, exported model with its memory.json, a recipe (its untrained model), or "
        "an adapter bank: its folder or run, or several joined by commas",
    )
    memory.add_argument(
        "--suite", default="kvstream", metavar="NAME",
        help="kvstream (default), locomo, longmemeval, memoryagentbench, squad, ttl or jsonl",
    )  # fmt: skip
    memory.add_argument("--path", metavar="FILE", help="the suite's file; kvstream is generated")
    memory.add_argument("--episodes", type=int, metavar="N", help="at most, each seed; default 256")
    memory.add_argument(
        "--seeds", type=int, metavar="N", help="draws of episodes where they are drawn; default 3"
    )
    memory.add_argument(
        "--conversations", metavar="I[,I...]", help="locomo: positions in the file; default: all"
    )
    memory.add_argument(
        "--questions", type=int, metavar="N", help="of an episode of a file, at most; default: all"
    )
    memory.add_argument(
        "--chunk", type=int, metavar="N", help="characters of a chunk, where a text is cut"
    )
    memory.add_argument(
        "--answerer", metavar="WHO",
        help="rule, self, smollm2-135m, a model's folder or an http address; "
        "default: the recipe's",
    )  # fmt: skip
    memory.add_argument(
        "--answerer-model", metavar="NAME", help="the model's name at an http address"
    )
    memory.add_argument(
        "--lengths", metavar="N[,N...]", help="kvstream: also streams of N times the chunks"
    )
    memory.add_argument(
        "--baselines", metavar="NAME[,NAME...]",
        help="of empty, insert-all, bm25, full and oracle; default: all",
    )  # fmt: skip
    memory.add_argument("--json", metavar="FILE", help="write rows, ratios and env")
    memory.add_argument("--plot", metavar="FILE.png", help="draw it (extra plot)")
    memory.add_argument(
        "--set", nargs="+", action="extend", metavar="key=value",
        help="memory.KEY or data.stream.KEY of a trained model; any key of a recipe",
    )  # fmt: skip
    bank = memory.add_argument_group("of an adapter bank")
    bank.add_argument(
        "--systems", metavar="NAME[,NAME...]",
        help="of experts, base, shared=FOLDER (one adapter for all), full and rag; "
        "default: experts,base",
    )  # fmt: skip
    bank.add_argument(
        "--base", metavar="MODEL", help="instead of the bank's: smollm2-135m, a folder or hub name"
    )
    bank.add_argument("--k", type=int, metavar="N", help="entries found for a fact; default 5")
    bank.add_argument(
        "--answer-k", type=int, metavar="N", help="entries found for a question; default 10"
    )
    bank.add_argument(
        "--max-new-tokens", metavar="EXTRACT,UPDATE,GENERATE", help="default 256,160,24"
    )
    bank.add_argument("--batch-size", type=int, metavar="N", help="prompts at once; default 16")
    bank.add_argument("--judge", metavar="URL", help="a model that says which answers are right")
    bank.add_argument("--judge-model", metavar="NAME", help="its name at that address")
    bank.add_argument(
        "--resume", action="store_true", help="take systems that are in --json FILE from there"
    )

    look = add("memory", "look into the memories of a run")
    actions = look.add_subparsers(dest="action", metavar="show", required=True)
    text = "an episode of the last evaluation: chunks, operations, memory and answers"
    show = actions.add_parser("show", help=text, description=text[0].upper() + text[1:] + ".")
    show.add_argument("run", help="run folder")
    show.add_argument("--episode", type=int, metavar="K", help="position in --list; default 0")
    show.add_argument("--step", default="last", metavar="N", help="step of the evaluation")
    show.add_argument("--list", action="store_true", help="list the episodes and what they earned")
    show.add_argument("--html", metavar="FILE", help="write a page instead of printing")


def _add_distill(add: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """`distill collect` and `distill clean`."""
    distill = add("distill", "turn a teacher's replies into rows for memory experts")
    steps = distill.add_subparsers(dest="step", metavar="collect|clean", required=True)
    text = "play episodes through a teacher and keep its replies, or go on where that stopped"
    collect = steps.add_parser("collect", help=text, description=text[0].upper() + text[1:] + ".")
    collect.add_argument("out", metavar="OUT", help="folder to make, or to go on in")
    collect.add_argument(
        "--teacher", required=True, metavar="WHO",
        help="gold, smollm2-135m, a model's folder or hub name, or an http address",
    )  # fmt: skip
    collect.add_argument(
        "--teacher-model", metavar="NAME", help="the model's name at an http address"
    )
    collect.add_argument("--suite", required=True, metavar="NAME", help="kvstream, locomo or jsonl")
    collect.add_argument("--path", metavar="FILE", help="the suite's file; kvstream is generated")
    collect.add_argument(
        "--conversations", metavar="I[,I...]", help="locomo: positions in the file; default: all"
    )
    collect.add_argument(
        "--episodes", type=int, metavar="N", help="at most; default: 64 of kvstream, all of a file"
    )
    collect.add_argument("--seed", type=int, default=0, metavar="S", help="of kvstream's episodes")
    collect.add_argument(
        "--chunk", type=int, metavar="CHARS", help="locomo: characters of a chunk; default 2000"
    )
    collect.add_argument(
        "--questions", type=int, metavar="N", help="of an episode, at most; default: all"
    )
    collect.add_argument(
        "--operations", metavar="OP[,OP...]",
        help="of mem_extract, mem_update and mem_generate; those that one builds on come with it; "
        "default: all",
    )  # fmt: skip
    collect.add_argument(
        "--concurrency", type=int, default=8, metavar="N",
        help="requests at once, or rows of a batch of a model here; default 8",
    )  # fmt: skip
    collect.add_argument(
        "--rate", type=float, metavar="N", help="new requests a minute, at most; default: no limit"
    )
    collect.add_argument(
        "--timeout", type=float, default=60.0, metavar="S", help="seconds of a request; default 60"
    )
    collect.add_argument(
        "--retries", type=int, default=5, metavar="N", help="of a request; default 5"
    )
    collect.add_argument(
        "--retry-failed", action="store_true", help="ask again what the teacher failed at before"
    )

    text = "make training rows of the replies that are fit for it, and count the others by rule"
    clean = steps.add_parser("clean", help=text, description=text[0].upper() + text[1:] + ".")
    clean.add_argument("out", metavar="OUT", help="a folder of mnemic distill collect")
    clean.add_argument(
        "--max-tokens", type=int, metavar="N",
        help="words and marks of prompt and target together, at most; default: no limit",
    )  # fmt: skip
    clean.add_argument(
        "--max-answer-words", type=int, default=12, metavar="N", help="of an answer; default 12"
    )
    clean.add_argument(
        "--dedupe", action=argparse.BooleanOptionalAction, default=True,
        help="keep one row of each prompt; default: yes",
    )  # fmt: skip


def _add_report(add: Callable[[str, str], argparse.ArgumentParser]) -> None:
    """`report` and `compare`."""
    report = add("report", "write one page about one or several runs: curves, memory, samples")
    report.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    report.add_argument("--out", required=True, metavar="FILE.html", help="the page to write")
    report.add_argument("--png", metavar="FOLDER", help="also each chart as a file (extra plot)")
    _add_plan_choice(report)

    compare = add("compare", "train a grid of recipes, or go on with it, and lay them side by side")
    compare.add_argument("recipe", help=RECIPE_HELP)
    compare.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES_HELP)
    compare.add_argument(
        "--vary", action="append", required=True, metavar="KEY=A,B,C",
        help="a key and its values, as overrides are written; given again: every combination",
    )  # fmt: skip
    compare.add_argument(
        "--seeds", type=int, default=1, metavar="N",
        help="runs of each cell, with loop.seed counting up from the recipe's; default 1",
    )  # fmt: skip
    compare.add_argument(
        "--out",
        metavar="FOLDER",
        help="where the cells' run folders lie; default runs/compare-NAME",
    )
    _add_plan_choice(compare)


def _add_plan_choice(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--plan", action=argparse.BooleanOptionalAction, default=True,
        help="hold the plan beside what was measured (some seconds for each model); default: yes",
    )  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit status: 0 done, 1 it failed, 2 the request was wrong."""
    args = _parse(argv)
    rank = os.environ.get("RANK", "0")
    put_off_dynamo()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Keeps its order with standard error when both go to one file.
        sys.stdout.reconfigure(line_buffering=True)
    # Calls between our libraries, which no user of ours can change.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logger = logging.getLogger("mnemic")
    logger.setLevel(logging.INFO if rank == "0" else logging.ERROR)
    prefix = "mnemic: " if rank == "0" else f"mnemic (rank {rank}): "
    try:
        return _dispatch(args)
    except RecipeError as error:
        for line in str(error).splitlines():
            print(prefix + line, file=sys.stderr)
        return error.exit_code
    except UserError as error:
        print(prefix + str(error), file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # The reader of our output went away (mnemic ... | head).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.strerror is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"{prefix}{where}{error.strerror}", file=sys.stderr)
        return 1


def _parse(argv: list[str] | None) -> argparse.Namespace:
    """argparse takes no more overrides once an option stood between them; these are taken too."""
    top = parser()
    args, rest = top.parse_known_args(argv)
    wrong = [word for word in rest if word.startswith("-") or "=" not in word]
    if rest and (wrong or not hasattr(args, "overrides")):
        top.error(f"unrecognized arguments: {' '.join(wrong or rest)}")
    if rest:
        args.overrides += rest
    return args


def _dispatch(args: argparse.Namespace) -> int:
    if args.version:
        from importlib.metadata import version

        print(version("mnemic"))
        return 0
    if args.command is None:
        parser().print_help()
        return 2
    from mnemic.train import commands

    return getattr(commands, args.command)(args)


def console() -> NoReturn:
    """The command as a process of its own."""
    leave(main())


if __name__ == "__main__":
    console()
