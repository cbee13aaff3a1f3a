"""One HTML page about one or several runs: no script, nothing loaded from anywhere, all text
escaped.

Texts are a data set's and a model's. Besides the escaping, the page's own policy forbids scripts
and loads. It is as wide as its window: charts wrap into columns, tables scroll in boxes of their
own, and light or dark is what the reader's system says.
"""

from collections.abc import Sequence

from mnemic.train.report import sections
from mnemic.train.report.markup import block, escape
from mnemic.train.report.planned import Planned
from mnemic.train.report.read import Run

_LIGHT = ("#1f6fb2", "#c8511b", "#2e8540", "#8e44ad", "#b8860b", "#c2185b", "#00838f", "#5d6d7e")
_DARK = ("#5dade2", "#f0975a", "#6fcf97", "#c39bd3", "#f4d03f", "#f48fb1", "#4dd0e1", "#aeb6bf")

_STYLE = """
:root { color-scheme: light dark; --line: #d5d8dc; --soft: #f4f6f7; --dim: #566573;
  --bad: #b03a2e; --back: #ffffff; --ink: #17202a; LIGHT }
@media (prefers-color-scheme: dark) { :root { --line: #3a4148; --soft: #1d2226; --dim: #9aa5b1;
  --bad: #f1948a; --back: #121517; --ink: #e4e7ea; DARK } }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 80rem; margin: 0 auto; padding: 1rem;
  background: var(--back); color: var(--ink) }
.sample > p { padding-top: .35rem }
h1 { font-size: 1.35rem; overflow-wrap: anywhere; margin: 0 0 .25rem }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem } h3 { font-size: 1rem; margin: 1rem 0 .25rem;
  overflow-wrap: anywhere }
.dim { color: var(--dim); font-size: .9rem; margin: .25rem 0 } .bad { color: var(--bad) }
.box { overflow-x: auto; max-width: 100% }
table { border-collapse: collapse; font-size: .9rem } th { text-align: left; font-weight: 600 }
th, td { padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line);
  white-space: nowrap; vertical-align: top } td.n, th.n { text-align: right;
  font-variant-numeric: tabular-nums }
td.w { white-space: normal; min-width: 14rem; overflow-wrap: anywhere }
th:first-child, td:first-child { position: sticky; left: 0; background: var(--back);
  max-width: 45vw; white-space: normal; overflow-wrap: anywhere; min-width: min(9rem, 40vw) }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill,
  minmax(min(100%, 22rem), 1fr)) }
figure { margin: 0; min-width: 0 } figcaption { font-size: .9rem; font-weight: 600 }
figure > svg { width: 100%; height: auto; display: block }
svg text { font: 11px system-ui, sans-serif; fill: var(--dim) }
svg .end { text-anchor: end } svg .mid { text-anchor: middle }
svg .grid { stroke: var(--line); stroke-width: 1 }
svg .line { fill: none; stroke-width: 1.6; stroke-linejoin: round } svg .dashed {
  stroke-dasharray: 5 3 }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: .25rem 0 0;
  padding: 0; font-size: .85rem } .legend li { overflow-wrap: anywhere }
svg.key { width: 18px; height: 4px; margin-right: .4rem; vertical-align: middle }
.sample { border: 1px solid var(--line); border-radius: .5rem; padding: .25rem .75rem;
  margin: .5rem 0; display: grid; grid-template-columns: 5rem minmax(0, 1fr); align-items: start }
.t, pre { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate;
  background: var(--soft); border-radius: .35rem; padding: .5rem; margin: .25rem 0;
  font: .85rem/1.4 ui-monospace, monospace; max-height: 20rem; overflow-y: auto }
summary { cursor: pointer; padding: .25rem 0 }
"""


def page(
    runs: Sequence[Run], planned: Sequence[Planned] | None = None, *, title: str = "",
    head: str = "",
) -> str:  # fmt: skip
    """The whole page. `planned`: one for each run, or None to leave the plan out; `head`: HTML that
    stands above the runs.
    """
    title = title or ", ".join(run.label for run in runs)
    parts = [
        head,
        sections.overview(runs),
        sections.differences(runs),
        sections.curves(runs),
        sections.budgets(runs),
        sections.plan_against_measured(runs, planned),
        sections.samples(runs),
        sections.recipes(runs),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_style()}</style></head><body>"
        f"{block('h1', title)}{''.join(parts)}</body></html>\n"
    )


def _style() -> str:
    def named(colors: Sequence[str]) -> str:
        return " ".join(f"--c{i}: {color};" for i, color in enumerate(colors))

    classes = "".join(
        f"svg .line.c{i} {{ stroke: var(--c{i}) }} svg circle.c{i} {{ fill: var(--c{i}) }}\n"
        for i in range(len(_LIGHT))
    )
    return _STYLE.replace("LIGHT", named(_LIGHT)).replace("DARK", named(_DARK)) + classes
