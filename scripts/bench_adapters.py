"""A trained bank on held-out prompts: exact match of base and experts for each operation, and
whether how it is served changes what it says.

    python scripts/bench_adapters.py BANK[,BANK...] [--rows 128] [--plain 8] [--json FILE]

BANK is a run folder of a `memlora` recipe, or its final/. The rows are `operations` rows of the
held-out split: names, values and sentences that no training row has, no prompt twice. `base` is the
same model without adapters, greedy as well.

Three ways must give the same texts: each operation alone (`one by one`), all prompts of all
operations in shuffled batches (`mixed`), and each adapter's folder loaded into a fresh model by
plain peft and transformers' generate, one prompt at a time (`plain peft`, for --plain prompts of
each operation). Seconds are wall time.
"""

import argparse
import json
import platform
import random
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

NEW = 40


def rows_of(op: str, count: int) -> list[dict[str, Any]]:
    from mnemic.train.data.memory.operations_rows import split_rows

    return list(split_rows(op, "heldout", count))


def texts(tokenizer: Any, found: list[Any]) -> list[str]:
    return [tokenizer.decode(one.ids, skip_special_tokens=True).strip() for one in found]


def plain_texts(source: Any, op: str, prompts: list[list[int]], tokenizer: Any) -> list[str]:
    """What peft and transformers say, of a base that is loaded anew."""
    import torch
    from peft import PeftModel

    from mnemic.train import eval_bank

    base = eval_bank.load(source).bank.model.unload()
    base.config.use_cache = True
    model = PeftModel.from_pretrained(base, str(source.experts[op])).eval()
    said = []
    for ids in prompts:
        given = torch.tensor([ids])
        with torch.no_grad():
            out = model.generate(
                input_ids=given, attention_mask=torch.ones_like(given), do_sample=False,
                max_new_tokens=NEW, pad_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
        said.append(tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True).strip())
    return said


def measure(target: str, count: int, plain: int) -> dict[str, Any]:
    from mnemic.models.memory.op_writer import ModelWriter
    from mnemic.train.eval_bank import find, load

    source = find(target)
    loaded = load(source)
    bank, tokenizer = loaded.bank, loaded.tokenizer
    writer = ModelWriter(
        bank, tokenizer, adapters=dict.fromkeys(("mem_extract", "mem_update", "mem_generate"))
    )
    end = tokenizer.eos_token_id
    settings = {"eos_id": end, "pad_id": end, "max_new_tokens": NEW, "batch_size": 32}
    rows, alone, flat, by_op = [], {}, [], {}
    for op in bank.operations:
        made = rows_of(op, count)
        prompts = [writer.prompt(row["prompt"]) for row in made]
        golds = [row["completion"][0]["content"].strip() for row in made]
        row: dict[str, Any] = {"name": op, "rows": len(made), "bytes": bank.bytes()[op]}
        for name, who in (("base", None), ("expert", op)):
            start = time.perf_counter()
            found = bank.generate(prompts, [who] * len(prompts), **settings)
            row[f"{name}_seconds"] = time.perf_counter() - start
            row[f"{name}_tokens"] = sum(len(one.ids) for one in found)
            said = texts(tokenizer, found)
            hits = sum(a == b for a, b in zip(said, golds, strict=True))
            row[f"{name}_exact_match"] = hits / len(golds)
            alone[op] = said
        by_op[op] = prompts
        flat += [(op, i) for i in range(len(prompts))]
        rows.append(row)
        speed = row["expert_tokens"] / row["expert_seconds"]
        print(f"{op:<14} base {row['base_exact_match']:.3f}  expert "
              f"{row['expert_exact_match']:.3f}  {speed:.0f} tok/s", flush=True)  # fmt: skip
    random.Random(0).shuffle(flat)
    mixed = texts(
        tokenizer,
        bank.generate([by_op[op][i] for op, i in flat], [op for op, _ in flat], **settings),
    )
    for row in rows:
        op = row["name"]
        same = [text == alone[op][i] for (o, i), text in zip(flat, mixed, strict=True) if o == op]
        row["mixed_equal"] = sum(same) / len(same)
        said = plain_texts(source, op, by_op[op][:plain], tokenizer)
        row["plain_peft_equal"] = sum(a == b for a, b in zip(said, alone[op], strict=False)) / max(
            1, len(said)
        )
        print(f"{op:<14} mixed batches equal {row['mixed_equal']:.3f}  plain peft equal "
              f"{row['plain_peft_equal']:.3f}", flush=True)  # fmt: skip
    return {"rows": rows, "base": source.model}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--plain", type=int, default=8)
    parser.add_argument("--json", metavar="FILE")
    args = parser.parse_args()
    found = measure(args.target, args.rows, args.plain)
    ratios = {
        f"{row['name']}_expert_minus_base": row["expert_exact_match"] - row["base_exact_match"]
        for row in found["rows"]
    }
    env = {
        "base": found["base"], "torch": version("torch"), "peft": version("peft"),
        "transformers": version("transformers"), "python": platform.python_version(),
    }  # fmt: skip
    if args.json:
        text = json.dumps({"rows": found["rows"], "ratios": ratios, "env": env}, indent=1)
        Path(args.json).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
