"""Which tokens each layer kept, over the text: one HTML page.

    python scripts/plot_tokens.py RECIPE [--row N] [--out tokens.html] [a.b=c ...]

One forward of the recipe's model on one of its training rows. On top a strip for each set of
layers, a column a token; below the text, darker where more layers kept it, underlined where it is
supervised; hovering names the layers.
"""

import argparse
import html
from pathlib import Path
from typing import Any

import torch

from mnemic.train.build import build_model, build_tokenizer
from mnemic.train.data.collate import collate
from mnemic.train.data.stream import take
from mnemic.train.errors import UserError
from mnemic.train.objectives.build import train_stream
from mnemic.train.objectives.tokens import token_loss
from mnemic.train.recipe.load import find_recipe, load_recipe
from mnemic.train.tokens import install_tokens

STYLE = """
body { font: 15px/1.7 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
svg { width: 100%; height: 14px; display: block; background: #eee; margin: 2px 0 }
.text { white-space: pre-wrap; overflow-wrap: anywhere }
.text span { border-radius: 2px }
.s { text-decoration: underline 2px #c0392b }
td { padding: 0 .6rem 0 0; white-space: nowrap } td:last-child { width: 100% }
@media (prefers-color-scheme: dark) {
  body { background: #111; color: #ddd } svg { background: #333 }
}
"""


def page(title: str, pieces: list[str], sets: list[tuple[str, list[bool]]], layers: int,
         supervised: list[bool]) -> str:  # fmt: skip
    """`pieces`: the text of each token; `sets`: name and kept tokens of each run of layers, of
    `layers` sparse layers in all.
    """
    rows = []
    for name, kept in sets:
        bars = "".join(
            f'<rect x="{start}" width="{stop - start}" height="1"/>' for start, stop in spans(kept)
        )
        share = sum(kept) / len(kept)
        strip = f'<svg viewBox="0 0 {len(kept)} 1" preserveAspectRatio="none">{bars}</svg>'
        rows.append(f"<tr><td>{name}</td><td>{share:.0%}</td><td>{strip}</td></tr>")
    text = []
    for i, piece in enumerate(pieces):
        mine = [name for name, kept in sets if kept[i]]
        depth = len(mine) / len(sets)
        shade = f"background: rgba(46, 134, 193, {0.5 * depth:.2f})"
        mark = ' class="s"' if supervised[i] else ""
        label = html.escape("kept by " + ", ".join(mine) if mine else "dropped by all")
        text.append(f'<span{mark} style="{shade}" title="{label}">{html.escape(piece)}</span>')
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8>"
        f'<meta name=viewport content="width=device-width"><title>{html.escape(title)}</title>'
        f"<style>{STYLE} rect {{ fill: #2e86c1 }}</style><h1>{html.escape(title)}</h1>"
        f"<p>{len(pieces)} tokens; {layers} sparse layers. Underlined: supervised.</p>"
        f"<table>{''.join(rows)}</table><p class=text>{''.join(text)}</p></html>"
    )


def spans(kept: list[bool]) -> list[tuple[int, int]]:
    """Runs of kept tokens, [start, stop)."""
    found: list[tuple[int, int]] = []
    for i, value in enumerate(kept):
        if value and found and found[-1][1] == i:
            found[-1] = found[-1][0], i + 1
        elif value:
            found.append((i, i + 1))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Which tokens each layer kept.")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--row", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("tokens.html"))
    args = parser.parse_intermixed_args()
    try:
        find_recipe(args.recipe)
        recipe, _ = load_recipe(args.recipe, args.overrides)
        tokenizer = build_tokenizer(recipe)
        model: Any = build_model(recipe, tokenizer).train()
        installed = install_tokens(recipe, model, tokenizer)
    except UserError as error:
        raise SystemExit(f"plot_tokens: {error}") from None
    if installed is None:
        raise SystemExit("plot_tokens: the recipe drops no tokens; add tokens=protect")
    sparsity, _ = installed
    stream = train_stream(recipe, tokenizer, quiet=True)
    example = take(stream.stream, args.row + 1)[args.row]
    batch = collate([example], pad_id=tokenizer.pad_token_id, packed=stream.packed)
    torch.manual_seed(recipe.loop.seed)
    with torch.enable_grad():
        token_loss(model, batch)
    assert sparsity.forward is not None
    ids = batch.tensors["input_ids"][0].tolist()
    sets = []
    for number, run in enumerate(sparsity.runs):
        kept = torch.zeros(len(ids), dtype=torch.bool)
        kept[sparsity.selected(sparsity.forward, number)[0]] = True
        name = f"layer {run[0]}" if len(run) == 1 else f"layers {run[0]} to {run[-1]}"
        sets.append((name, kept.tolist()))
    title = f"{recipe.name}: tokens kept, {recipe.tokens.kind}"
    supervised = sparsity.forward.row.supervised[0].tolist()
    pieces = [tokenizer.decode([i]) for i in ids]
    args.out.write_text(
        page(title, pieces, sets, len(sparsity.sparse), supervised), encoding="utf-8"
    )
    share = sum(sum(kept) for _, kept in sets) / len(sets) / len(ids)
    print(f"{args.out}: {len(ids)} tokens, {share:.0%} kept by {len(sparsity.sparse)} layers")


if __name__ == "__main__":
    main()
