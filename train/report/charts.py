"""Line charts as SVG: axes, ticks, lines, and a legend in HTML. No script, no library.

The drawing is about as wide as a phone, so that its letters keep their size there; on a wide
screen several stand side by side. Colors are classes, so that the page's style has them for
light and dark.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from mnemic.train.report.read import Points

WIDTH, HEIGHT = 400, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 10, 34
COLORS = 8
"""Number of color classes; past them lines are dashed."""
_MOST = 400
"""Points of a line, at most: more are no wider than a pixel."""


@dataclass(frozen=True)
class Line:
    """`color`: number of the run, the same in every chart of a page."""

    label: str
    points: Points
    color: int = 0


@dataclass(frozen=True)
class Axis:
    """Ticks at multiples of `step` that cover `low` to `high`."""

    low: float
    high: float
    step: float

    @property
    def ticks(self) -> list[float]:
        count = round((self.high - self.low) / self.step)
        return [self.low + self.step * i for i in range(count + 1)]

    def at(self, value: float) -> float:
        """0 to 1."""
        return (value - self.low) / (self.high - self.low)

    def text(self, value: float) -> str:
        digits = max(0, -math.floor(math.log10(self.step) + 1e-9))
        most = max(abs(self.low), abs(self.high))
        if most and (digits > 4 or most >= 1e6):
            return f"{value:.{max(0, math.ceil(math.log10(most / self.step)))}e}" if value else "0"
        return f"{value:,.{digits}f}"


def axis(
    values: Sequence[float], *, zero: bool = False, whole: bool = False, count: int = 5
) -> Axis:
    """Round ticks around `values`, about `count` of them; `zero`: from 0; `whole`: integers."""
    low, high = min(values), max(values)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0) if low or high else 1.0
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        # A flat line lies in the middle of something.
        room = abs(high) * 0.1 or 1.0
        low, high = low - room, high + room
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * f for f in (1, 2, 2.5, 5, 10) if size * f >= rough * 0.999)
    if whole:
        step = max(1.0, math.ceil(step))
    return Axis(math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, step)


def thin(points: Points, most: int = _MOST) -> Points:
    """No more than `most` points that look the same: first, lowest, highest and last of each
    stretch, so that no spike is lost.
    """
    if len(points) <= most:
        return points
    size = math.ceil(len(points) * 4 / most)
    found: Points = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        by_value = sorted(part, key=lambda p: p[1])
        found += sorted({part[0], by_value[0], by_value[-1], part[-1]})
    return found


def chart(
    title: str, lines: Sequence[Line], *, zero: bool = False, across: str = "step",
    legend: bool = False,
) -> str:  # fmt: skip
    """A figure; empty where no line has a point. `across`: what the horizontal axis counts."""
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    every = [point for line in lines for point in line.points]
    x, y = axis([p[0] for p in every], whole=True), axis([p[1] for p in every], zero=zero)
    # The last step is where the line ends: no empty room behind it.
    ends = min(p[0] for p in every), max(p[0] for p in every)
    x = Axis(*ends, x.step) if ends[0] < ends[1] else x
    parts = [*_horizontal(y), *_vertical(x, across), *(_drawn(line, x, y) for line in lines)]
    named = html.escape(title)
    return (
        f"<figure><figcaption>{named}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{named}">{"".join(parts)}'
        f"</svg>{_legend(lines) if legend else ''}</figure>"
    )


def _horizontal(y: Axis) -> list[str]:
    found = []
    for tick in y.ticks:
        at = _down(y, tick)
        found.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{at}" y2="{at}"/>')
        found.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" class="end">{y.text(tick)}</text>')
    return found


def _vertical(x: Axis, across: str) -> list[str]:
    first = math.ceil(x.low / x.step - 1e-9) * x.step
    ticks = [first + x.step * i for i in range(int((x.high - first) / x.step + 1e-9) + 1)]
    base = HEIGHT - _BOTTOM
    found = [
        f'<text x="{_along(x, tick)}" y="{base + 14}" class="mid">{x.text(tick)}</text>'
        for tick in ticks
    ]
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    found.append(f'<text x="{middle}" y="{HEIGHT - 5}" class="mid">{html.escape(across)}</text>')
    return found


def _along(x: Axis, value: float) -> float:
    return round(_LEFT + x.at(value) * (WIDTH - _LEFT - _RIGHT), 1)


def _down(y: Axis, value: float) -> float:
    return round(HEIGHT - _BOTTOM - y.at(value) * (HEIGHT - _TOP - _BOTTOM), 1)


def _drawn(line: Line, x: Axis, y: Axis) -> str:
    shown = thin(line.points)
    places = [(_along(x, a), _down(y, b)) for a, b in shown]
    path = " ".join(f"{a:g},{b:g}" for a, b in places)
    name = html.escape(line.label)
    found = f'<polyline class="line {_class(line.color)}" points="{path}"/>'
    if len(shown) <= 30:
        # Few points are measurements of their own; each says its value to who points at it.
        found += "".join(
            f'<circle class="{_class(line.color)}" cx="{a:g}" cy="{b:g}" r="2.5">'
            f"<title>{name}: {value:.6g} at {at:g}</title></circle>"
            for (a, b), (at, value) in zip(places, shown, strict=True)
        )
    return found


def _class(color: int) -> str:
    return f"c{color % COLORS}" + (" dashed" if color >= COLORS else "")


def _legend(lines: Sequence[Line]) -> str:
    items = "".join(
        f'<li><svg class="key" viewBox="0 0 18 4" aria-hidden="true"><line class="line '
        f'{_class(line.color)}" x1="0" x2="18" y1="2" y2="2"/></svg>{html.escape(line.label)}</li>'
        for line in lines
    )
    return f'<ul class="legend">{items}</ul>'
