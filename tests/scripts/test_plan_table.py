"""The planned figures in recipes/README.md are those that the plan gives now."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "scripts" / "plan_table.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("plan_table", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines_of(script) -> list[list[str]]:
    text = script.README.read_text("utf-8").split(script.BEGIN)[1].split(script.END)[0]
    return [line.strip("| ").split(" | ") for line in text.strip().splitlines()[2:]]


def test_every_shape_and_way_has_its_line(script):
    found = [(model.split(" (")[0], how) for model, how, *_ in lines_of(script)]
    assert found == [(model, how) for model in script.SHAPES for how in script.WAYS]


@pytest.mark.parametrize(
    ("model", "way"), [("Llama-3.2-1B", "`finetune_apollo_mini`"), ("Qwen3-4B", "`lowmem_full`")]
)
def test_a_line_is_what_the_plan_gives(script, model, way):
    (row,) = script.rows(model, [way])
    fresh = script.table([row]).splitlines()[-1].strip("| ").split(" | ")
    named = {(line[0].split(" (")[0], line[1]): line for line in lines_of(script)}
    shown = named[model, way]
    assert shown[:2] == fresh[:2]
    for mine, theirs in zip(shown[2:5], fresh[2:5], strict=True):
        # Versions of torch differ a little in what a kernel keeps.
        assert (mine == theirs == "-") or float(mine) == pytest.approx(float(theirs), rel=0.03)
