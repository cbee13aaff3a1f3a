"""Writes docs/reference-recipe.md and docs/reference-api.md from the recipe's types and from the
source's docstrings.

    python scripts/reference.py           # says whether they are current; exit status 1 if not
    python scripts/reference.py --write
"""

import argparse
import sys
from pathlib import Path

import reference_api
import reference_recipe

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {
    DOCS / "reference-recipe.md": reference_recipe.page,
    DOCS / "reference-api.md": reference_api.page,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the pages that differ")
    args = parser.parse_args()
    stale = 0
    for path, page in PAGES.items():
        text = page()
        current = path.exists() and path.read_text("utf-8") == text
        if args.write and not current:
            path.write_text(text, "utf-8")
        stale += not (current or args.write)
        state = "current" if current else "written" if args.write else "not current; --write it"
        print(f"docs/{path.name}: {state}")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
