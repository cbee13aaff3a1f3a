"""The generated reference is current, whole, and says something of every name."""

import ast
import importlib
import re
import sys

import pytest
from docs_support import PAGES, ROOT, blocks

from mnemic.train.recipe.recipe import Recipe

RECIPE, API = (ROOT / "docs" / f"reference-{name}.md" for name in ("recipe", "api"))


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])
    return importlib.import_module("reference")


def test_the_pages_are_those_of_the_source(script):
    for path, page in script.PAGES.items():
        assert path.read_text("utf-8") == page(), "run  python scripts/reference.py --write"


def test_the_script_writes_and_tells_what_is_stale(script, tmp_path, monkeypatch, capsys):
    pages = {tmp_path / path.name: page for path, page in script.PAGES.items()}
    monkeypatch.setattr(script, "PAGES", pages)
    for words, status in ((["--write"], 0), ([], 0)):
        monkeypatch.setattr(sys, "argv", ["reference.py", *words])
        assert script.main() == status
    first = next(iter(pages))
    first.write_text(first.read_text() + "more\n")
    assert script.main() == 1
    assert f"{first.name}: not current" in capsys.readouterr().out


def test_every_key_of_the_schema_has_its_line():
    """By `mnemic schema`, which is another way through the same types."""
    schema = Recipe.model_json_schema()
    page = RECIPE.read_text()
    keys = 0
    for part in (schema, *schema["$defs"].values()):
        for key, found in part["properties"].items():
            if key == "kind" and "const" in found:
                assert re.search(rf"(?m)^####? [\w.]+: {re.escape(found['const'])}$", page)
                continue
            words = " ".join(found["description"].split()).replace("|", r"\|")
            words = words.replace("<tool_call>", "&lt;tool_call>")
            assert any(
                line.startswith(f"| `{key}` |") and line.endswith(f"| {words} |")
                for line in page.splitlines()
            ), (part.get("title"), key)
            keys += 1
    assert keys > 200


def test_a_field_without_a_docstring_is_refused(script, monkeypatch):
    monkeypatch.setattr(Recipe.model_fields["run_dir"], "description", None)
    with pytest.raises(ValueError, match=r"without a docstring: mnemic\.\S+\.Recipe\.run_dir$"):
        script.reference_recipe.page()


def test_a_name_that_is_not_there_is_refused(script, monkeypatch):
    sections = [("Title", "", {"mnemic.train.errors": "NoError"})]
    monkeypatch.setattr(script.reference_api, "SECTIONS", sections)
    with pytest.raises(ValueError, match=r"mnemic\.train\.errors has no NoError"):
        script.reference_api.page()


@pytest.mark.parametrize("path", [RECIPE, API], ids=lambda path: path.stem)
def test_links_lead_to_headings_that_are_there_once(script, path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    anchors = [script.reference_recipe.anchor(h) for h in re.findall(r"(?m)^#+ (.*)", text)]
    assert len(anchors) == len(set(anchors)), sorted(anchors)
    links = re.findall(r"\]\(#([^)]*)\)", text)
    assert links and set(links) <= set(anchors), set(links) - set(anchors)


def imports(text: str) -> set[tuple[str, str]]:
    found = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom)]
    return {(str(n.module), a.name) for n in found for a in n.names if "mnemic" in str(n.module)}


def listed() -> set[tuple[str, str]]:
    lines = re.findall(r"(?m)^from \S+ import \S+$", API.read_text())
    return {pair for line in lines for pair in imports(line)}


def test_the_names_can_be_imported():
    for module, name in listed():
        assert hasattr(importlib.import_module(module), name), (module, name)


@pytest.mark.parametrize(
    "block", [b for page in PAGES for b in blocks(page) if b.language == "python"],
    ids=lambda block: block.where,
)  # fmt: skip
def test_what_the_documentation_imports_is_in_the_reference(block):
    names = {name for _, name in listed()}
    assert {name for _, name in imports(block.text)} <= names


def test_no_page_names_an_address_or_a_path_of_this_machine():
    for path in (RECIPE, API):
        assert not re.search(r"0x[0-9a-f]{6}", path.read_text()), path
        assert str(ROOT) not in path.read_text()
