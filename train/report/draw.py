"""The page's charts as PNG files, by matplotlib (extra `plot`)."""

from collections.abc import Sequence
from pathlib import Path

from mnemic.train.errors import UserError
from mnemic.train.report.figures import Figure, groups
from mnemic.train.report.read import Run
from mnemic.train.rollout.report import need_matplotlib


def draw_all(runs: Sequence[Run], folder: Path) -> list[Path]:
    """A file for each chart; `UserError` where the folder cannot be made or matplotlib is
    missing.
    """
    need_matplotlib("--png")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        figures = [figure for group in groups(runs) for figure in group.figures]
        return [_draw(figure, folder / f"{figure.name}.png") for figure in figures]
    except OSError as error:
        raise UserError(
            f"--png {folder}: cannot be written: {error.strerror}; give another folder"
        ) from None


def _draw(figure: Figure, path: Path) -> Path:
    from matplotlib import pyplot

    drawn, axes = pyplot.subplots(figsize=(7, 4), dpi=120)
    try:
        for line in figure.lines:
            x, y = zip(*line.points, strict=True) if line.points else ((), ())
            # A name that begins with an underscore would be left out of the legend.
            axes.plot(
                x, y, label=_words(line.label.lstrip("_")), color=f"C{line.color % 10}",
                linewidth=1.4, marker="o" if len(x) <= 30 else None, markersize=3,
            )  # fmt: skip
        if figure.zero:
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        axes.set_xlabel(figure.across)
        axes.set_title(_words(figure.title), fontsize=10)
        if len(figure.lines) > 1:
            axes.legend(fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        drawn.tight_layout()
        drawn.savefig(path)
    finally:
        pyplot.close(drawn)
    return path


def _words(text: str) -> str:
    """Not a formula, which "$" would begin."""
    return text.replace("$", r"\$")
