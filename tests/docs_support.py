"""The commands and blocks of the project's Markdown."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "recipes" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TUTORIALS = [page for page in PAGES if page.name.startswith("tutorial-")]

STARTS = ("mnemic", "python", "accelerate", "torchrun", "pytest", "make", "pip", "wandb", "trl")
_SPAN = re.compile(
    r"`((?:mnemic|python scripts/|accelerate launch|torchrun|pytest|make|pip)\s?[^`]*)`"
)
# `mnemic[data]` is a package, `make_store(...)` is code.
_WORD = re.compile(rf"(?:[A-Z_]+=\S+ +)*(?:{'|'.join(STARTS)})(?: |$)")


@dataclass(frozen=True)
class Block:
    """A fenced block; `name`: the file that its first line names, as in ```python agent.py."""

    page: Path
    line: int
    language: str
    name: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    found, lines, start = [], page.read_text().splitlines(), None
    for number, line in enumerate(lines, 1):
        if not line.startswith("```"):
            continue
        if start is None:
            start = number
            continue
        language, _, name = lines[start - 1].removeprefix("```").partition(" ")
        text = "\n".join(lines[start : number - 1]) + "\n"
        found.append(Block(page, start, language, name.strip(), text))
        start = None
    assert start is None, f"{page}:{start}: a block that does not end"
    return found


def shell(text: str) -> list[str]:
    """The commands of a block: continued lines joined, comments off."""
    joined = re.sub(r"\\\n\s*", "", text)
    return [c for line in joined.splitlines() if (c := re.sub(r"\s+# .*", "", line).strip())]


def commands(page: Path) -> list[str]:
    """Each command of a page once: of shell blocks, of indented blocks, and between backticks."""
    found = [c for block in blocks(page) if block.language == "sh" for c in shell(block.text)]
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    indented = re.findall(r"^    ((?:.*\\\n)*.*)", prose, flags=re.MULTILINE)
    found += [c for text in indented for c in shell(text) if _WORD.match(c)]
    found += [c for c in _SPAN.findall(prose) if _WORD.match(c) and len(c.split()) > 1]
    return list(dict.fromkeys(found))
