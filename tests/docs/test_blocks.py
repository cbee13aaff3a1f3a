"""YAML and Python blocks of the documentation are what they claim to be."""

import ast
import importlib

import pytest
import yaml
from docs_support import PAGES, blocks
from support import lm_tree, merge

from mnemic.train.recipe.load import build_recipe

ALL = [block for page in PAGES for block in blocks(page)]


@pytest.mark.parametrize(
    "block", [b for b in ALL if b.language == "yaml" and b.name != "sweep.yaml"],
    ids=lambda b: b.where,
)  # fmt: skip
def test_a_yaml_block_is_part_of_a_recipe(block, tmp_path):
    build_recipe(merge(lm_tree(tmp_path), yaml.safe_load(block.text)))


def test_the_sweep_gives_overrides_that_the_recipe_takes(tmp_path):
    """As `wandb agent` writes them, for each end of each parameter."""
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    from mnemic.train.cli import parser
    from mnemic.train.recipe.load import load_recipe

    (block,) = [b for b in ALL if b.name == "sweep.yaml"]
    sweep = yaml.safe_load(block.text)
    assert sweep["metric"]["name"] == "eval/loss"
    for pick in (0, -1):
        values = {
            key: {"value": given["values"][pick] if "values" in given else given["min"]}
            for key, given in sweep["parameters"].items()
        }
        macros = utils.create_sweep_command_args({"args": values})
        macros["program"] = [sweep["program"]]
        words = []
        for word in utils.create_sweep_command(list(sweep["command"])):
            words += macros[word[2:-1]] if word.startswith("${") else [word]
        assert words[0] == "mnemic"
        args = parser().parse_args(words[1:])
        recipe, _ = load_recipe(args.recipe, args.overrides)
        assert recipe.track.kind == "wandb"
        for key, given in values.items():
            section, name = key.split(".")
            assert getattr(getattr(recipe, section), name) == given["value"]


@pytest.mark.parametrize(
    "block", [b for b in ALL if b.language == "python"], ids=lambda b: b.where
)  # fmt: skip
def test_a_python_block_compiles_and_its_imports_are_there(block):
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"
