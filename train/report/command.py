"""`mnemic report`: reads the runs, writes the page and, where asked for, the PNG files."""

import logging
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from mnemic.train.errors import UserError
from mnemic.train.report.page import page
from mnemic.train.report.planned import plans
from mnemic.train.report.read import Run, read_runs

log = logging.getLogger("mnemic")


def report(args: Namespace) -> int:
    """The command."""
    out = Path(args.out)
    if out.is_dir():
        raise UserError(
            f"--out {out}: is a folder; give the file to write, such as {out}/page.html"
        )
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: its folder is not there; make it first")
    if args.png:
        from mnemic.train.rollout.report import need_matplotlib

        need_matplotlib("--png")
    runs = read_runs(args.runs)
    for run in runs:
        for note in run.notes:
            log.warning("note: %s: %s", run.label, note)
    write_page(runs, out, plan=args.plan)
    if args.png:
        from mnemic.train.report.draw import draw_all

        drawn = draw_all(runs, Path(args.png))
        print(f"{args.png}: {len(drawn)} charts")
    print(f"{out}: {len(runs)} run{'' if len(runs) == 1 else 's'}, {out.stat().st_size:,} bytes")
    return 0


def write_page(
    runs: Sequence[Run], out: Path, *, plan: bool = True, title: str = "", head: str = ""
) -> None:
    """See `page`. `plan`: also plan the recipes, which imports torch and takes seconds."""
    made = page(runs, plans(runs) if plan else None, title=title, head=head)
    try:
        out.write_text(made, "utf-8")
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error.strerror}; give another file") from None
