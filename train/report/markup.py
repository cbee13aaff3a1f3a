"""Pieces of HTML: escaped text, and tables that scroll in their own box."""

import html
from collections.abc import Sequence
from typing import Any

from mnemic.train.memory_show import plain


def escape(text: Any) -> str:
    """Neither markup nor a control or direction character gets through."""
    return html.escape(plain(text), quote=True)


def block(tag: str, text: Any, kind: str = "") -> str:
    """An element of text, of class `kind`."""
    return f"<{tag}{f' class={chr(34)}{kind}{chr(34)}' if kind else ''}>{escape(text)}</{tag}>"


def table(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], *, wide: Sequence[int] = ()
) -> str:
    """First column of words, the others of figures on the right; `wide`: positions of those that
    are long texts.
    """

    def kind(i: int) -> str:
        return "w" if i in wide else "n" if i else ""

    head = "".join(block("th", name, kind(i).replace("w", "")) for i, name in enumerate(columns))
    body = "".join(
        "<tr>" + "".join(block("td", cell, kind(i)) for i, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f'<div class="box"><table><tr>{head}</tr>{body}</table></div>'


def folded(title: str, inner: str) -> str:
    """`inner`, HTML, behind a line to open."""
    return f"<details>{block('summary', title)}{inner}</details>"
