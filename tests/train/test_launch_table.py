"""The table of recipes and launches in recipes/README.md is what validation says."""

import re
from pathlib import Path

import pytest

from mnemic.train.errors import UserError
from mnemic.train.preflight import check_environment
from mnemic.train.recipe.load import load_recipe, shipped_recipes

README = Path(__file__).parent.parent.parent / "recipes" / "README.md"
ENGINES = {
    "ddp": {},
    "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
    "zero3": {"ACCELERATE_USE_DEEPSPEED": "true"},
}


def cells() -> dict[tuple[str, str], str]:
    text = README.read_text("utf-8").split("<!-- launch: begin -->")[1].split("<!-- launch")[0]
    head, _, *lines = [line.strip("| ").split(" | ") for line in text.strip().splitlines()]
    assert head == ["recipe", *ENGINES]
    return {
        (line[0].strip("`"), engine): cell
        for line in lines
        for engine, cell in zip(ENGINES, line[1:], strict=True)
    }


def test_every_recipe_has_its_line():
    assert {recipe for recipe, _ in cells()} == set(shipped_recipes())


@pytest.mark.parametrize(("recipe", "engine"), list(cells()))
def test_a_cell_is_what_validation_says(recipe, engine, monkeypatch, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for key, value in ENGINES[engine].items():
        monkeypatch.setenv(key, value)

    def validate(*overrides):
        # A model that another recipe trains first is not here.
        made, _ = load_recipe(recipe, list(overrides))
        if made.model.kind == "pretrained":
            made, _ = load_recipe(recipe, [*overrides, f"model.path={tmp_path}"])
        check_environment(made)

    cell = cells()[recipe, engine]
    if cell == "runs":
        validate()
        return
    refused = re.fullmatch(r"no: `([a-z.]+)`", cell)
    with pytest.raises(UserError) as caught:
        validate()
    if refused:
        assert str(caught.value).startswith(f"{refused[1]}=")
    else:
        assert cell[0] == cell[-1] == "`"
        validate(*cell.strip("`").split())
