"""Every command of the documentation is one that its program would take, with the files that it
names: recipes validate with their overrides, scripts and launchers parse their flags, tests and
targets exist. What cannot be checked stands in `ELSEWHERE`, by its whole text.
"""

import argparse
import contextlib
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import pytest
from docs_support import PAGES, ROOT, commands
from support import TEXT, lm_tree, write_jsonl, write_recipe

from mnemic.train.cli import main, parser
from mnemic.train.report.grid import make_cells, parse_grid

ELSEWHERE = {
    "trl vllm-serve --model Qwen/Qwen3-4B": "TRL's server, which needs a GPU",
    "wandb login": "asks for a key",
}

# Words that stand for the reader's own, and the fixture's file or value that takes their place.
WORDS = {
    "FILE": "text.txt", "FILES": "text.txt", "ROWS.jsonl": "rows.jsonl", "RECIPE": "tiny.yaml",
    "R.yaml": "tiny.yaml", "SIZE": "1GiB", "FOLDER": "folder", "KEY=A,B": "loop.seed=0,1",
    "OUT.json": "out.json", "WHO": "gold", "kvstream|locomo|jsonl": "kvstream",
}  # fmt: skip


class Parsed(Exception):
    pass


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder with what the commands name."""
    folder = tmp_path_factory.mktemp("desk")
    write_recipe(folder / "tiny.yaml", lm_tree(folder))
    (folder / "text.txt").write_text(TEXT * 3)
    (folder / "folder").mkdir()
    rows = [{"prompt": f"{i} ", "completion": str(i)} for i in range(40)]
    write_jsonl(folder / "rows.jsonl", rows)
    (folder / "OUT" / "clean").mkdir(parents=True)
    bank = [dict(row, operation="mem_extract") for row in rows]
    write_jsonl(folder / "OUT" / "clean" / "mem_extract.jsonl", bank)
    for page in PAGES:
        from docs_support import blocks

        for block in blocks(page):
            if block.name:
                (folder / block.name).write_text(block.text)
    assert main(["recipes", "cp", "quickstart", str(folder / "mine.yaml")]) == 0
    # Checkpoints and data that recipes start from, as far as validation looks.
    for name in ("runs/warm/final", "runs/memory_sft_tiny/final",
                 "runs/memory_sft_smollm2/merged", "M", "folder"):  # fmt: skip
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text("{}")
    for name in ("recipes", "docs", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    return folder


def filled(text):
    """The command's words with the reader's own in place; optional parts are there."""
    # Of a synopsis: `[key=value ...]`, `[SIZE]`, `[--flag]`.
    text = re.sub(r"(?<= )\[(?:key=value \.\.\.|([^\[\]=]*))\](?= |$)", lambda m: m[1] or "", text)
    words = [w for w in shlex.split(text.replace("RUN...", "RUN")) if w != "..."]
    found = []
    for word in words:
        key, mark, value = word.partition("=")
        word = WORDS.get(word, word)
        found.append(f"{key}{mark}{WORDS[value]}" if mark and value in WORDS else word)
    return found


def check(text):
    """Raises where a command would not be taken."""
    for part in text.split(" && "):
        if part in ELSEWHERE:
            continue
        words = filled(part)
        while re.fullmatch(r"[A-Z_]+=\S*", words[0]) and len(words) > 1:
            words = words[1:]
        if " ".join(words) in ELSEWHERE:
            continue
        known = CHECKS.get(words[0])
        assert known, f"{part!r}: nothing checks it; add a check, or a line of ELSEWHERE"
        known(words[1:])


def check_mnemic(words):
    if words[0] in ("--help", "--version"):
        return
    top = parser()
    names = [w for w in words if not w.startswith("-")]
    subcommands = {" ".join(path) for path in _paths(top)}
    if " ".join(words) in subcommands:
        return  # named in prose, without its arguments
    if words[0] == "compare":
        check_compare(words)
        return
    args = top.parse_args(words)
    if args.command in ("train", "validate", "plan"):
        assert main(["validate", args.recipe, *args.overrides]) == 0, names


def check_compare(words):
    """All cells are made, and none is refused."""
    from mnemic.train.report import compare

    def cells(args):
        found = make_cells(
            args.recipe, parse_grid(args.vary, args.overrides, args.seeds), args.overrides,
            args.seeds, Path(args.out),
        )  # fmt: skip
        assert found and all(cell.recipe and not cell.refused for cell in found), found
        raise Parsed

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(compare, "compare", cells)
        with pytest.raises(Parsed):
            main(words)


def _paths(command):
    """All chains of subcommands."""
    for action in command._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                yield [name]
                yield from ([name, *rest] for rest in _paths(sub))


def check_python(words):
    if words[0].startswith("scripts/"):
        check_script(words)
    elif words[0] == "-c":
        compile(words[1], "command", "exec")
    else:
        assert Path(words[0]).exists(), words[0]


def check_script(words):
    """Up to where the script has parsed its arguments."""
    real = argparse.ArgumentParser.parse_intermixed_args

    def parse(self, args=None, namespace=None):
        patched.undo()
        real(self, args if args is not None else words[1:], namespace)
        raise Parsed

    spec = importlib.util.spec_from_file_location("documented", ROOT / words[0])
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", words)
        patched.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
        for name in ("parse_args", "parse_intermixed_args"):
            patched.setattr(argparse.ArgumentParser, name, parse)
        with pytest.raises(Parsed):
            spec.loader.exec_module(module)
            module.main()


def check_accelerate(words):
    from accelerate.commands.launch import launch_command_parser

    if words == ["launch"] or words[-1].isdigit():
        return  # flags named in prose
    args = launch_command_parser().parse_args(words[1:])
    assert Path(args.config_file).is_file(), args.config_file
    assert args.module and args.training_script == "mnemic.train.cli", words
    check_mnemic(args.training_script_args)


def check_torchrun(words):
    from torch.distributed.run import get_args_parser

    args = get_args_parser().parse_args(words)
    assert args.module and args.training_script == "mnemic.train.cli", words
    check_mnemic(args.training_script_args)


def check_pytest(words):
    paths = [w for i, w in enumerate(words) if not w.startswith("-") and words[i - 1] != "-m"]
    assert paths
    for path in paths:
        assert (ROOT / path).exists() or Path(path).exists(), path


def check_make(words):
    targets = re.search(r"^\.PHONY: (.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets and set(words) <= set(targets[1].split()), words


def check_pip(words):
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert words[0] == "install"
    for extras in re.findall(r"\[(.*?)\]", " ".join(words)):
        assert set(extras.split(",")) <= project["optional-dependencies"].keys(), words


def check_wandb(words):
    cli = pytest.importorskip("wandb.cli.cli").cli
    command = cli
    while words and hasattr(command, "commands"):
        assert words[0] in command.commands, words
        command, words = command.commands[words[0]], words[1:]
    options = {name for param in command.params for name in param.opts}
    assert {w for w in words if w.startswith("--")} <= options, words


CHECKS = {
    "mnemic": check_mnemic, "python": check_python, "accelerate": check_accelerate,
    "torchrun": check_torchrun, "pytest": check_pytest, "make": check_make, "pip": check_pip,
    "wandb": check_wandb, "cat": lambda words: None, "ls": lambda words: None,
    "tail": lambda words: None,
}  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_every_command_would_be_taken(page, desk, monkeypatch, capfd):
    monkeypatch.chdir(desk)
    failed = []
    for command in commands(page):
        try:
            check(command)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            said = capfd.readouterr().err.strip().splitlines()[-1:]
            failed.append(f"{command}\n    {type(error).__name__} {error} {said}")
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("wrong", [
    "mnemic train pretrain_tiny data.path=FILE loop.stepz=3", "mnemic plam RECIPE",
    "mnemic plan RECIPE --lenght 8", "python scripts/bench_loop.py --quik",
    "python scripts/none.py", "pytest tests/none", "make quickstrat", "pip install -e '.[non]'",
    "torchrun --nproc_per_node 2 -m mnemic.train.cli train pretrain_tiny loop.stepz=3",
    "accelerate launch --config_file recipes/accelerate/none.yaml -m mnemic.train.cli train RECIPE",
    "wandb sweeep x.yaml", "docker run x",
    "mnemic compare pretrain_tiny --vary optimizr=adamw,apollo --out grid data.path=FILE",
])  # fmt: skip
def test_a_wrong_command_is_found(wrong, desk, monkeypatch):
    monkeypatch.chdir(desk)
    with pytest.raises((Exception, SystemExit)) as caught, contextlib.redirect_stderr(None):
        if check(wrong) is None:
            return
    assert caught.type is not pytest.fail.Exception
