"""Train LeMo's pattern predictors for a model and say what they recall and cost.

    python scripts/train_predictors.py smollm2-135m --text FILE --out predictors.safetensors

The file is for a recipe's `tokens.score=predictor tokens.score_path=...`. The last fifth of the
rows is held out: recall there is the share of the blocks with the highest true scores that the
predictor also puts highest; beside it, what a fixed order of places would recall, learned from the
same training rows, because early blocks have more queries after them.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mnemic.models.exact.attention import decoder_layers
from mnemic.models.load import load_causal_lm, load_tokenizer
from mnemic.models.smollm2 import ensure_smollm2
from mnemic.models.tokens.config import TokensConfig
from mnemic.models.tokens.predictor import Predictors, flops, hidden_size, save_predictors
from mnemic.models.tokens.predictor_fit import fit, observe, overlap


def text_rows(path: Path, tokenizer: Any, length: int, count: int) -> list[Tensor]:
    """`count` rows (1, length) of the text's tokens, evenly spread over it."""
    ids = tokenizer(path.read_text("utf-8"))["input_ids"]
    found = len(ids) // length
    if found < count:
        raise SystemExit(f"{path} has {found} rows of {length} tokens; {count} were asked for")
    starts = [length * (i * found // count) for i in range(count)]
    return [torch.tensor([ids[s : s + length]]) for s in starts]


def recalls(
    predictors: Predictors, model: Any, train: list[Tensor], held: list[Tensor], keep: float
) -> dict[int, dict[str, float]]:
    """By layer: recall of the predictor and of places alone, on held-out rows."""
    layers = [int(i) for i in predictors.layers]
    places: dict[int, Tensor] = {}
    found: dict[int, dict[str, float]] = {i: {"recall": 0.0, "places": 0.0} for i in layers}

    def learn(index: int, hidden: Tensor, truth: Tensor) -> None:
        places[index] = places.get(index, torch.zeros(())) + truth.sum(1)

    def measure(index: int, hidden: Tensor, truth: Tensor) -> None:
        mass = truth.sum(1)
        own = overlap(predictors.of(index)(hidden).sum(1), mass, keep)
        found[index]["recall"] += own / len(held)
        found[index]["places"] += overlap(places[index], mass, keep) / len(held)

    for rows, see in ((train[:: max(1, len(train) // 12)], learn), (held, measure)):
        for ids in rows:
            observe(model, ids, layers, predictors.block, see)
    return found


def cost(predictors: Predictors, model: Any, length: int) -> dict[str, float]:
    """All predictors beside a training step, forward and backward of all weights, of one row:
    FLOPs by formula (linear layers, logits and attention; backward twice forward), CPU seconds.
    """
    width = hidden_size(model)
    inner = model.base_model
    linear = sum(p.numel() for n, p in inner.named_parameters() if p.ndim == 2 and "embed" not in n)
    logits = model.get_output_embeddings().weight.numel()
    attention = length * width * len(decoder_layers(model))  # q k^T and p v, of which causal half
    step = 6 * length * (linear + logits + attention)
    own = sum(
        flops(width, length, p.units, p.rank, p.block)  # type: ignore[union-attr,arg-type]
        for p in predictors.layers.values()
    )
    ids = torch.randint(0, model.config.get_text_config().vocab_size, (1, length))
    hidden = torch.randn(1, length, width, dtype=next(model.parameters()).dtype)
    with torch.no_grad():
        seconds = min(_seconds(lambda: [p(hidden) for p in predictors.layers.values()], 3))
    model.requires_grad_(True)
    whole = min(_seconds(lambda: model(input_ids=ids, labels=ids).loss.backward(), 2))
    model.zero_grad(set_to_none=True)
    return {
        "flops": own, "step_flops": step, "flops_share": own / step,
        "seconds": seconds, "step_seconds": whole, "seconds_share": seconds / whole,
    }  # fmt: skip


def _seconds(run: Any, times: int) -> list[float]:
    found = []
    for _ in range(times):
        start = time.process_time()
        run()
        found.append(time.process_time() - start)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="folder, or smollm2-135m")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--layers", default="all", help="as in a recipe, or FIRST,LAST")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--shrink", type=float, default=0.0, help="prune more: 0.2, 1")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = str(ensure_smollm2()) if args.model == "smollm2-135m" else args.model
    model = load_causal_lm(folder, dtype="fp32").requires_grad_(False)
    rows = text_rows(args.text, load_tokenizer(folder), args.length, args.rows)
    held = rows[-math.ceil(len(rows) / 5) :]
    train = rows[: -len(held)]
    names: Any = tuple(map(int, args.layers.split(","))) if "," in args.layers else args.layers
    layers = TokensConfig(layers=names).layer_range(len(decoder_layers(model)))
    start = time.process_time()
    predictors = fit(
        model, train, layers,
        block=args.block, rank=args.rank, steps=args.steps, lr=args.lr, seed=args.seed,
        shrink=args.shrink,
    )  # fmt: skip
    spent = time.process_time() - start
    save_predictors(args.out, predictors)
    found = recalls(predictors, model, train, held, args.keep)
    print(f"{'layer':>5} {'recall':>7} {'places':>7}   hidden units")
    for layer, row in found.items():
        units = predictors.of(layer).units
        print(f"{layer:>5} {row['recall']:>7.3f} {row['places']:>7.3f}   {units[0]}, {units[1]}")
    mean = {key: sum(r[key] for r in found.values()) / len(found) for key in ("recall", "places")}
    print(f"{'mean':>5} {mean['recall']:>7.3f} {mean['places']:>7.3f}")
    before, after = predictors.before_pruning, predictors.size
    print(
        f"parameters {before:,} -> {after:,} ({after / before - 1:.1%}); {spent:.0f} CPU s to fit"
    )
    share = cost(predictors, model, args.length)
    print(
        f"of a step: {share['flops_share']:.2%} of the FLOPs, {share['seconds_share']:.2%} of the "
        f"CPU seconds ({share['seconds']:.3f} of {share['step_seconds']:.1f})"
    )
    if args.json:
        rows_out = [{"name": f"layer {i}", **row} for i, row in found.items()]
        figures = {**mean, "before": before, "after": after, "fit_seconds": spent, **share}
        args.json.write_text(json.dumps({"rows": rows_out, "ratios": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
