"""What each command of `mnemic` does, given its parsed arguments."""

import json
import logging
import shutil
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from mnemic.train.errors import RecipeError, UserError
from mnemic.train.recipe.load import (
    dump_recipe,
    find_recipe,
    load_recipe,
    read_yaml,
    shipped_recipes,
    to_yaml,
)
from mnemic.train.recipe.recipe import Recipe

log = logging.getLogger("mnemic")


def train(args: Namespace) -> int:
    recipe, notes = load_recipe(args.recipe, _overrides(args))
    for note in notes:
        log.warning("note: %s", note)
    from rich.console import Console

    from mnemic.train.preflight import is_main_process
    from mnemic.train.run import run
    from mnemic.train.sweep import as_trial

    recipe = as_trial(recipe)
    # A long line is one line in a log file, whatever width rich assumes there.
    console = Console(soft_wrap=True)
    summary = run(recipe, console)
    if is_main_process():
        from mnemic.train.summary import show

        show(summary, recipe, console)
    return 0


def validate(args: Namespace) -> int:
    recipe, notes = load_recipe(args.recipe, args.overrides)
    for note in notes:
        log.warning("note: %s", note)
    from mnemic.train.preflight import check_data, check_environment

    check_environment(recipe)
    for note in check_data(recipe):
        log.info(note)
    if args.show:
        print(to_yaml(dump_recipe(recipe)), end="")
    print(f"{args.recipe}: valid; it would train into {recipe.folder}")
    return 0


def _overrides(args: Namespace) -> list[str]:
    """Those of the command line, with what `--low-memory` says."""
    size = args.low_memory
    if size is None:
        return args.overrides
    if "=" in size:
        # No size was given, and argparse took the next override for one.
        return [*args.overrides, size, "loop.memory_budget=auto"]
    from mnemic.train.recipe.offload import parse_size

    try:
        parse_size(size) if size != "auto" else None
    except ValueError as error:
        raise RecipeError(f"--low-memory: {error}") from None
    return [*args.overrides, f"loop.memory_budget={size}"]


def plan(args: Namespace) -> int:
    recipe, notes = load_recipe(args.recipe, _overrides(args))
    for note in notes:
        log.warning("note: %s", note)
    if args.low_memory:
        return _plan_low_memory(args, recipe)
    if recipe.loop.memory_budget:
        log.info("the recipe as it is; --low-memory shows what loop.memory_budget makes of it")
    lengths = _lengths(args.length) if args.length else None
    if not args.tbw > 0:
        raise RecipeError("--tbw: must be above 0")
    if args.activations:
        return _plan_activations(args, recipe, lengths)
    if args.budget:
        raise RecipeError("--budget: is for --activations; add that")
    from mnemic.train.plan.plan import plan as make
    from mnemic.train.plan.show import as_values, show

    disk = [Path(folder) for folder in args.disk or []]
    report = make(recipe, lengths=lengths, disk=disk, tbw=args.tbw)
    if args.json:
        print(json.dumps(as_values(report), indent=1))
    else:
        show(report)
    return 0


def _plan_low_memory(args: Namespace, recipe: Recipe) -> int:
    for flag in ("activations", "budget", "length", "disk"):
        if getattr(args, flag):
            raise RecipeError(f"--{flag}: does not go with --low-memory; leave one out")
    from mnemic.train.plan.budget import check_one_process
    from mnemic.train.plan.choose import choose
    from mnemic.train.plan.show_choice import as_values, show

    check_one_process(recipe)
    choice = choose(recipe)
    if args.json:
        print(json.dumps(as_values(choice), indent=1))
    else:
        show(choice)
    return 0


def _plan_activations(args: Namespace, recipe: Recipe, lengths: list[int] | None) -> int:
    from mnemic.train.plan.combinations import activations
    from mnemic.train.plan.show_activations import as_values, show
    from mnemic.train.recipe.offload import parse_size

    try:
        budget = parse_size(args.budget) if args.budget else None
    except ValueError as error:
        raise RecipeError(f"--budget: {error}") from None
    table = activations(recipe, lengths=lengths, budget=budget)
    if args.json:
        print(json.dumps(as_values(table), indent=1))
    else:
        show(table)
    return 0


def _lengths(text: str) -> list[int]:
    """`4096` or `4096,16384`."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 2:
        raise RecipeError(f"--length: {text!r} is not a number of tokens, or several with commas")
    return found


def recipes(args: Namespace) -> int:
    shipped = shipped_recipes()
    if args.action == "ls":
        width = max(map(len, shipped), default=0)
        for name, path in shipped.items():
            print(f"{name:<{width}}  {_first_comment(path)}")
        return 0
    source = find_recipe(args.name)
    target = Path(args.target or ".")
    if target.is_dir():
        target = target / source.name
    if target.exists():
        raise UserError(f"{target}: exists already; give another name")
    if not target.parent.is_dir():
        raise UserError(f"{target.parent}: no such folder")
    shutil.copyfile(source, target)
    print(f"{target}: copied; edit it, then  mnemic train {target}")
    return 0


def _first_comment(path: Path) -> str:
    for line in path.read_text("utf-8").splitlines():
        text = line.lstrip("# ").strip()
        if line.startswith("#") and text and "$schema" not in text:
            return text
    return str(read_yaml(path).get("name", ""))


def schema(args: Namespace) -> int:
    from mnemic.train.recipe.recipe import Recipe

    text = json.dumps(Recipe.model_json_schema(), indent=1)
    if args.out:
        Path(args.out).write_text(text + "\n", "utf-8")
        print(
            f"{args.out}: put  # yaml-language-server: $schema={args.out}  on a recipe's first line"
        )
    else:
        print(text)
    return 0


def export(args: Namespace) -> int:
    from mnemic.train.export import export_run

    out = export_run(
        args.run, args.target, checkpoint=args.checkpoint, merge=args.merge, average=args.average
    )
    print(f"{out}: written; from_pretrained loads it")
    return 0


def generate(args: Namespace) -> int:
    from mnemic.train.folder import open_run

    if args.max_new_tokens < 1:
        raise RecipeError("--max-new-tokens: must be 1 or more")
    folder, _ = open_run(args.run)
    prompts = args.prompt or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise RecipeError("generate: no prompt; give one as an argument or on standard input")
    from mnemic.train.export import load_run
    from mnemic.train.generate import generate_greedy

    model, tokenizer, recipe = load_run(args.run, args.checkpoint)
    form = (folder.read_summary() or {}).get("prompt_form", "chat")
    learned = recipe.objective.kind in ("sft", "distill")
    chat = form == "chat" and learned and tokenizer.chat_template
    bank = getattr(model, "expert_bank", None)
    if args.operation and (bank is None or args.operation not in bank.operations):
        known = "has no bank of operations" if bank is None else ", ".join(bank.operations)
        raise UserError(
            f"--operation {args.operation}: this run {'' if bank is None else 'has '}{known}"
        )
    if args.base and not hasattr(model, "disable_adapter"):
        raise UserError("--base: this run has no adapters to leave out")
    system = getattr(recipe.objective, "system", None)
    ids = [
        _chat_ids(tokenizer, system, prompt) if chat else tokenizer(prompt).input_ids
        for prompt in prompts
    ]
    from contextlib import nullcontext

    if bank is not None:
        chosen = args.operation or bank.operations[0]
        if not args.operation and len(bank.operations) > 1 and not args.base:
            log.info("answered by %s; --operation chooses another of the bank", chosen)
        context = bank.use(None if args.base else chosen)
    else:
        context = model.disable_adapter() if args.base else nullcontext()
    with context:
        for text in generate_greedy(model, tokenizer, ids, max_new_tokens=args.max_new_tokens):
            print(text.strip())
    return 0


def _chat_ids(tokenizer: Any, system: str | None, prompt: str) -> list[int]:
    """A conversation of one user turn, as the run trained on."""
    from mnemic.train.data.tokenize import render, with_system

    messages = with_system([{"role": "user", "content": prompt}], system)
    return render(tokenizer, messages, generation=True)


def eval(args: Namespace) -> int:
    from mnemic.train.eval_memory import eval_memory

    return eval_memory(args)


def memory(args: Namespace) -> int:
    from mnemic.train.memory_show import memory_show

    return memory_show(args)


def distill(args: Namespace) -> int:
    if args.step == "collect":
        from mnemic.train.distill.collect import collect

        return collect(args)
    from mnemic.train.distill.clean import clean

    return clean(args)


def report(args: Namespace) -> int:
    from mnemic.train.report.command import report

    return report(args)


def compare(args: Namespace) -> int:
    from mnemic.train.report.compare import compare

    return compare(args)


def doctor(args: Namespace) -> int:
    from mnemic.train.doctor import examine, show

    report = examine(Path(args.path))
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        show(report)
    return 0
