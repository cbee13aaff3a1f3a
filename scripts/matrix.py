"""Tries every combination of objective, optimizer, update, offload, tokens, adapters and ranks.

    python scripts/matrix.py [--json FILE] [--write]

A cell runs a few steps of a small model or is refused with a reason before a model is built;
anything else is a failure, and so are cells whose figures must be equal and are not, or must differ
and do not. Prints a table; `--write` makes docs/matrix.md and docs/matrix.json of it. Exit status 1
if anything failed. About ten minutes on two cores, without a GPU and without a network.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import time
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write every cell's result, with its losses")
    parser.add_argument("--write", action="store_true", help="write docs/matrix.md and .json")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["HF_HUB_OFFLINE"] = "1"
    from matrix_cells import all_cells
    from matrix_check import compare
    from matrix_page import render, summarize
    from matrix_try import try_cells

    logging.getLogger("mnemic").propagate = False
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mnemic-matrix-") as folder:
        results = try_cells(all_cells(), Path(folder), tell=lambda line: print(line, flush=True))
    comparison = compare(results)
    report = summarize(results, comparison)
    print(render(report))
    print(f"{time.perf_counter() - began:.0f} s")
    failures = [f"{r.cell}: {' / '.join(r.reasons)}" for r in results if r.status == "failed"]
    for line in failures + comparison.complaints:
        print(f"FAILED {line}", file=sys.stderr)
    if args.json:
        args.json.write_text("".join(result.line() for result in results))
    if args.write:
        (DOCS / "matrix.md").write_text(render(report))
        (DOCS / "matrix.json").write_text(json.dumps(report, indent=1) + "\n")
    return 1 if failures or comparison.complaints else 0


if __name__ == "__main__":
    raise SystemExit(main())
