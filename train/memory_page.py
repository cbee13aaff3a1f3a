"""An episode as one HTML page: no script, nothing loaded from anywhere, all text escaped.

The texts are a data set's and a model's. Besides the escaping, the page's own policy forbids
scripts and loads, and each text stands in its own direction, so that it cannot reorder what is
beside it.
"""

import html
from typing import Any

from mnemic.train.memory_show import (
    SIGNS,
    call_text,
    change_text,
    live,
    plain,
    summary,
    turn_rewards,
)

_STYLE = """
:root { color-scheme: light dark; --line: #d5d8dc; --soft: #f4f6f7; --good: #1e7e45;
  --bad: #b03a2e; --part: #8a6100; --dim: #5d6d7e }
@media (prefers-color-scheme: dark) { :root { --line: #3a4148; --soft: #1d2226; --good: #6fcf97;
  --bad: #f1948a; --part: #f4d03f; --dim: #9aa5b1 } body { background: #121517; color: #e4e7ea } }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.25rem; overflow-wrap: anywhere } h2 { font-size: 1.05rem; margin: 0 0 .5rem }
section { border: 1px solid var(--line); border-radius: .5rem; padding: .75rem; margin: 1rem 0 }
.t { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate }
.chunk, pre { background: var(--soft); border-radius: .35rem; padding: .5rem; margin: .25rem 0 }
pre { font: .85rem/1.4 ui-monospace, monospace }
ul { list-style: none; padding: 0; margin: .25rem 0 } li { padding: .1rem 0 .1rem 1.4rem;
  text-indent: -1.4rem } li > * { text-indent: 0 }
.sign { display: inline-block; width: 1.4rem; font-family: ui-monospace, monospace }
.dim, summary, h3 { color: var(--dim); font-size: .85rem; font-weight: normal; margin: .5rem 0 0 }
.good { color: var(--good) } .bad { color: var(--bad) } .part { color: var(--part) }
.gone { text-decoration: line-through; color: var(--dim) }
"""


def page(episode: dict[str, Any], number: int) -> str:
    """The whole page of episode `number`, a line of episodes.jsonl."""
    title = f"episode {number}: {episode['id']}, step {episode['step']}"
    turns = "".join(_turn(episode, index) for index in range(len(episode["turns"])))
    questions = "".join(_question(one) for one in episode["questions"])
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_escape(title)}</title><style>{_STYLE}</style></head><body>"
        f'<h1>{_escape(title)}</h1><p class="dim">{_escape(summary(episode))}</p>{turns}'
        f"<section><h2>Questions</h2><ul>{questions}</ul></section>{_memory(episode)}"
        "</body></html>\n"
    )


def _escape(text: Any) -> str:
    return html.escape(plain(text), quote=True)


def _text(text: Any, kind: str = "") -> str:
    return f'<span class="t {kind}">{_escape(text)}</span>'


def _item(sign: str, text: str, kind: str = "") -> str:
    return f'<li class="{kind}"><span class="sign">{sign}</span>{text}</li>'


def _turn(episode: dict[str, Any], index: int) -> str:
    turn = episode["turns"][index]
    calls = "".join(
        _item("", _text(call_text(call)))
        if call["error"] is None
        else _item("&#10007;", f"{_text(call_text(call))} ({_text(call['error'])})", "bad")
        for call in turn["calls"]
    )
    kinds = {"+": "good", "-": "bad", "~": "part"}
    changes = "".join(
        _item(sign := SIGNS[change["op"]], _text(change_text(change)), kinds[sign])
        for change in turn["changes"]
    )
    return (
        f"<section><h2>Chunk {index + 1} of {len(episode['turns'])}</h2>"
        f'<div class="chunk t">{_escape(turn["chunk"])}</div>'
        f'<p class="dim">{_escape(turn_rewards(episode, index))}</p>'
        f"<h3>Calls</h3><ul>{calls or _item('', 'none')}</ul>"
        f"<h3>Memory</h3><ul>{changes or _item('', 'unchanged')}</ul>"
        f"<details><summary>Memory shown, and what the model wrote</summary>"
        f'<pre class="t">{_escape(turn["view"])}</pre>'
        f'<pre class="t">{_escape(turn["text"])}</pre></details></section>'
    )


def _question(one: dict[str, Any]) -> str:
    kind = "good" if one["score"] >= 1 else "bad" if one["score"] <= 0 else "part"
    sign = {"good": "&#10003;", "bad": "&#10007;", "part": "~"}[kind]
    gold = ", ".join(_text(answer) for answer in one["answers"])
    return _item(
        sign,
        f'{_text(one["q"])} <span class="dim">{_escape(one["type"])}, score {one["score"]:.2f}'
        f"</span><br>said {_text(one['said'])}, gold {gold}",
        kind,
    )


def _memory(episode: dict[str, Any]) -> str:
    memory = episode["memory"]
    entries = "".join(_entry(entry) for entry in memory["entries"])
    core = f'<p class="t">core: {_escape(memory["core"])}</p>' if memory["core"] else ""
    return (
        f"<section><h2>Final memory, {len(live(episode))} entries</h2>{core}<ul>{entries}</ul>"
        "</section>"
    )


def _entry(entry: dict[str, Any]) -> str:
    """Deleted ones and replaced contents struck through."""
    time = f"[{entry['time']}] " if entry.get("time") else ""
    text = _text(f"{entry['id']} {time}{entry['content']}", "gone" if entry["deleted"] else "")
    past = "".join(f"<br>{_text(content, 'gone')}" for content, _ in entry["previous"])
    return _item("-" if entry["deleted"] else "", text + past)
