"""Profile block-score thresholds for a model's sparse layers (LeMo, Alg. 1).

    python scripts/profile_thresholds.py smollm2-135m --text FILE --out thresholds.json

The file is for a recipe's `tokens.thresholds`; give the recipe's layers, share, block and score.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from mnemic.models.exact.attention import decoder_layers
from mnemic.models.load import load_causal_lm, load_tokenizer
from mnemic.models.smollm2 import ensure_smollm2
from mnemic.models.tokens.config import TokensConfig
from mnemic.models.tokens.predictor import load_predictors
from mnemic.models.tokens.thresholds import profile, write_thresholds

sys.path.insert(0, str(Path(__file__).parent))
from train_predictors import text_rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", help="folder, or smollm2-135m")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--layers", default="half", help="as in a recipe, or FIRST,LAST")
    parser.add_argument(
        "--share", type=int, default=1, help="layers that have one keep set; 0: all"
    )
    parser.add_argument("--scope", choices=("layer", "attention"), default="layer")
    parser.add_argument("--score", default="lemo")
    parser.add_argument("--predictors", type=Path, help="file of train_predictors.py, as score")
    parser.add_argument("--keep", type=float, default=0.5, help="mean over the sparse layers")
    parser.add_argument("--block", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    folder = str(ensure_smollm2()) if args.model == "smollm2-135m" else args.model
    model = load_causal_lm(folder, dtype="fp32").requires_grad_(False)
    rows = text_rows(args.text, load_tokenizer(folder), args.length, args.rows)
    names: Any = tuple(map(int, args.layers.split(","))) if "," in args.layers else args.layers
    config = TokensConfig(
        keep=args.keep, layers=names, share=args.share or None, scope=args.scope, score=args.score,
        block=args.block, sinks=0, recent=0, protect=False, loss="all",
    )  # fmt: skip
    score = load_predictors(args.predictors, model) if args.predictors else None
    start = time.process_time()
    found = profile(
        model, [{"input_ids": ids} for ids in rows], config, rounds=args.rounds, score=score
    )
    spent = time.process_time() - start
    write_thresholds(args.out, found)
    print(f"{'layer':>5} {'threshold':>9}")
    for layer, threshold in found.items():
        print(f"{layer:>5} {threshold:>9.4f}")
    print(f"{len(found)} of {len(decoder_layers(model))} layers; {spent:.0f} CPU s")
    if args.json:
        table = [{"name": f"layer {layer}", "threshold": t} for layer, t in found.items()]
        figures = {"rows": table, "ratios": {}, "seconds": spent}
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
