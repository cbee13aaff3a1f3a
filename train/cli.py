"""The `mnemic` command. Parsing and help import nothing heavy; each command imports what
it needs.
"""

import argparse
import io
import logging
import os
import sys
import warnings

from mnemic.train.errors import RecipeError, UserError

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
    export.add_argument("--merge", action="store_true", help="fold the adapters into the model")

    generate = add("generate", "answer a prompt with a run's model")
    generate.add_argument("run", help="run folder")
    generate.add_argument("prompt", nargs="*", help="prompts; without any, lines of standard input")
    generate.add_argument("--checkpoint", help="a folder of checkpoints/ instead of the result")
    generate.add_argument("--max-new-tokens", type=int, default=128)
    generate.add_argument("--base", action="store_true", help="answer without the adapters")

    doctor = add("doctor", "tell versions, optional parts, disk speed, and what will not work")
    doctor.add_argument("path", nargs="?", default=".", help="where to measure the disk")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    return top


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit status: 0 done, 1 it failed, 2 the request was wrong."""
    args = parser().parse_args(argv)
    rank = os.environ.get("RANK", "0")
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


if __name__ == "__main__":
    sys.exit(main())
