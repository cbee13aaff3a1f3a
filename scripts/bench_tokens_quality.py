"""What token sparsity costs in quality: SmolLM2-135M with LoRA, dense evaluation, at equal steps
and at equal time.

    python scripts/bench_tokens_quality.py --xquad FILE --text FILE --out FILE [--tasks answer ...]

Tasks: `answer`, a passage among others, a question, a short answer (XQuAD's JSON; held-out
passages); `recall`, the code of a name somewhere in a text, loss by distance; `text`, perplexity of
plain text. Arms train the same rows in the same order; each is evaluated after the same number of
steps, and after as many more as its step is faster than dense (`--speed arm=1.6`, from
bench_tokens.py). Rows are appended to --out and found there by the next call, so it can be stopped.
"""

import argparse
import json
import random
import re
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mnemic.models.load import load_causal_lm, load_tokenizer
from mnemic.models.lora import add_lora
from mnemic.models.smollm2 import ensure_smollm2
from mnemic.models.tokens.sparsity import TokenSparsity
from mnemic.train.data.collate import collate
from mnemic.train.data.tokenize import Example
from mnemic.train.objectives.tokens import base_of, token_loss
from mnemic.train.recipe.tokens import Drop, Lemo, Protect, RandomLtd, TokenTune
from mnemic.train.tokens import to_config

KEEP = 0.5
ARMS: dict[str, Any] = {
    "dense": None,
    "protect": Protect(block=16),
    "protect, keep 0.5": Protect(block=16, keep=0.5),
    "protect, score lemo": Protect(block=16, score="lemo"),
    "protect, score random": Protect(block=16, score="random"),
    "drop": Drop(block=16),
    "drop, visible": Drop(block=16, attend="all"),
    "drop, score lemo": Drop(block=16, score="lemo"),
    "drop, score random": Drop(block=16, score="random"),
    "drop, half": Drop(block=16, layers="half"),
    "drop, dense end": Drop(block=16, ramp=0.2, dense_end=0.2),
    "truncation": "truncate",
    "lemo": Lemo(keep=KEEP),
    "random-ltd": RandomLtd(),
    "token_tune": TokenTune(),
    "loss subsampling": "subsample",
}


def answer_rows(path: Path, tokenizer: Any, length: int, held: bool, seed: int) -> list[Example]:
    """Passages up to `length` tokens, one of them with the answer, then question and answer."""
    articles = json.loads(path.read_text("utf-8"))["data"]
    paragraphs = [p for a in articles for p in a["paragraphs"]]
    draw = random.Random(0)
    draw.shuffle(paragraphs)
    cut = len(paragraphs) // 5
    mine = paragraphs[:cut] if held else paragraphs[cut:]
    draw = random.Random(seed + 1000 * held)
    rows = []
    questions = [(p, q) for p in mine for q in p["qas"]]
    draw.shuffle(questions)
    for paragraph, question in questions:
        answer = tokenizer.encode(" " + question["answers"][0]["text"] + "\n")
        tail = tokenizer.encode(f"\n\nQuestion: {question['question']}\nAnswer:")
        room = length - len(answer) - len(tail)
        parts = [tokenizer.encode(paragraph["context"] + "\n\n")]
        others = [p for p in mine if p is not paragraph]
        draw.shuffle(others)
        for other in others:
            ids = tokenizer.encode(other["context"] + "\n\n")
            free = room - sum(map(len, parts))
            if free <= 0:
                break
            parts.insert(draw.randint(0, len(parts)), ids[:free])
        context = [t for part in parts for t in part][:room]
        ids = context + tail + answer
        labels = [-100] * (len(ids) - len(answer)) + answer
        rows.append(Example(ids, labels, (len(ids),), len(ids)))
    return rows


NAMES = re.findall(
    r"\w+",
    "Ada Boris Clara Dmitri Elena Farid Greta Hugo Ines Jonas Kira Lars Mina Nils Olga Pavel Quinn "
    "Rosa Sven Tara Uwe Vera Wim Xenia Yusuf Zora",
)


def recall_rows(path: Path, tokenizer: Any, length: int, held: bool, seed: int) -> list[Example]:
    """Four names with a code each, spread over plain text, and a question about one of them. The
    distance of the one asked for is `source_length`.
    """
    lines = [x for x in path.read_text("utf-8").split("\n") if len(x) > 200]
    draw = random.Random(seed + 1000 * held + 7)
    lines = lines[: len(lines) // 5] if held else lines[len(lines) // 5 :]
    rows = []
    for _ in range(200):
        names = draw.sample(NAMES, 4)
        codes = [str(draw.randint(1000, 9999)) for _ in names]
        facts = [
            tokenizer.encode(f"\nThe code of {name} is {code}.\n")
            for name, code in zip(names, codes, strict=True)
        ]
        which = draw.randrange(4)
        answer = tokenizer.encode(" " + codes[which] + "\n")
        tail = tokenizer.encode(f"\n\nQuestion: What is the code of {names[which]}?\nAnswer:")
        room = length - len(answer) - len(tail) - sum(map(len, facts))
        text: list[int] = []
        while len(text) < room:
            text += tokenizer.encode(draw.choice(lines) + "\n")
        text = text[:room]
        places = sorted(draw.randint(0, room) for _ in facts)
        ids: list[int] = []
        distance = before = 0
        for number, (place, fact) in enumerate(zip(places, facts, strict=True)):
            ids += text[before:place]
            before = place
            distance = len(ids) if number == which else distance
            ids += fact
        ids += text[before:] + tail + answer
        labels = [-100] * (len(ids) - len(answer)) + answer
        rows.append(Example(ids, labels, (len(ids),), len(ids) - distance))
    return rows


def text_rows(path: Path, tokenizer: Any, length: int, held: bool, seed: int) -> list[Example]:
    text = path.read_text("utf-8")
    text = text[: len(text) // 5] if held else text[len(text) // 5 :]
    ids = tokenizer.encode(text)
    rows = [ids[i : i + length] for i in range(0, len(ids) - length, length)]
    random.Random(seed + 1000 * held).shuffle(rows)
    return [Example(r, [-100, *r[1:]], (length,), length) for r in rows]


def arm_rows(rows: list[Example], arm: Any, seed: int) -> list[Example]:
    """What an arm changes in the rows themselves: their beginning, or half of their targets."""
    if arm == "truncate":
        found = []
        for e in rows:
            start = int(len(e.input_ids) * (1 - KEEP))
            ids, labels = list(e.input_ids[start:]), list(e.labels[start:])
            found.append(Example(ids, [-100, *labels[1:]], (len(ids),), len(ids)))
        return found
    if arm == "subsample":
        draw = random.Random(seed)
        return [
            Example(e.input_ids, [x if draw.random() < KEEP else -100 for x in e.labels],
                    e.lengths, e.source_length)
            for e in rows
        ]  # fmt: skip
    return rows


@torch.no_grad()
def evaluate(model: Any, rows: list[Example], task: str, length: int) -> dict[str, float]:
    """Dense loss per target; for short answers also the share that greedy decoding gets whole."""
    model.eval()
    loss = weight = exact = 0.0
    buckets: dict[str, list[float]] = {}
    for row in rows:
        batch = collate([row], pad_id=0, packed=False)
        if task == "text":
            value, right = float(token_loss(model, batch)), 0.0
        else:
            columns = batch.tensors["logit_columns"]
            logits = model(
                input_ids=batch.tensors["input_ids"], use_cache=False, logits_to_keep=columns
            ).logits[0]
            targets = batch.tensors["labels"][0, columns + 1]
            value = float(F.cross_entropy(logits.float(), targets, reduction="sum"))
            right = float((logits.argmax(-1) == targets).all())
        loss, weight = loss + value, weight + batch.weight
        if task != "text":
            exact += right
            far = "far" if row.source_length > length // 2 else "near"
            if task == "recall":
                buckets.setdefault(f"loss_{far}", []).append(value / batch.weight)
                buckets.setdefault(f"exact_{far}", []).append(right)
    model.train()
    found = {"loss": loss / weight, "exact": exact / len(rows)}
    return found | {k: sum(v) / len(v) for k, v in buckets.items()}


def build(arm: Any, task: str, seed: int) -> tuple[Any, Any]:
    folder = str(ensure_smollm2(log=print))
    model = load_causal_lm(folder, dtype="bf16")
    model = add_lora(
        model, r=16, alpha=32, dropout=0.0, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        rslora=False, dora=False, quantized=False, seed=seed,
    )  # fmt: skip
    sparsity = None
    if arm is not None and not isinstance(arm, str):
        if task == "text" and arm.protect:
            arm = arm.model_copy(update={"protect": False})
        sparsity = TokenSparsity(model, to_config(arm), seed=seed)
    return model.train(), sparsity


def run(
    args: Any, task: str, name: str, seed: int, data: Any, speed: float
) -> list[dict[str, Any]]:
    train, held = data
    arm = ARMS[name]
    torch.manual_seed(seed)
    model, sparsity = build(arm, task, seed)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=args.lr, weight_decay=0.0)
    rows = arm_rows(train, arm, seed)
    steps = args.steps
    marks = {steps: "steps", max(steps, round(steps * speed)): "time"}
    if steps * speed < steps:
        marks = {round(steps * speed): "time", steps: "steps"}
    total, found, seconds = max(marks), [], []
    for step in range(1, total + 1):
        torch.manual_seed(1000 * seed + step)
        if sparsity:
            # Each evaluation is the end of a run of so many steps, for schedules.
            sparsity.progress = min(1.0, (step - 1) / steps) if step <= steps else step / total
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1.0, step / 4)
        batch = collate([rows[(step - 1) % len(rows)]], pad_id=0, packed=False)
        start = time.process_time()
        loss = token_loss(model, batch)
        (loss / batch.weight).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.process_time() - start)
        if step in marks:
            kinds = ["steps", "time"] if len(marks) == 1 else [marks[step]]
            result = evaluate(model, held, task, args.length)
            middle = sorted(seconds)[len(seconds) // 2]
            for kind in kinds:
                found.append({
                    "task": task, "arm": name, "seed": seed, "at": kind, "step": step,
                    "length": args.length, "cpu_seconds_per_step": middle,
                    "train_loss": float(loss.detach()) / batch.weight,
                    **(sparsity.report() if sparsity and sparsity.forward else {}), **result,
                })  # fmt: skip
    base_of(model).__dict__.pop("token_sparsity", None)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Quality of token sparsity.")
    parser.add_argument("--xquad", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=["answer", "recall", "text"])
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--held", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--speed", nargs="*", default=[], help="arm=ratio of step times to dense")
    args = parser.parse_args()
    speeds = {k: float(v) for k, v in (item.rsplit("=", 1) for item in args.speed)}
    tokenizer = load_tokenizer(str(ensure_smollm2(log=print)))
    done = set()
    if args.out.exists():
        for line in args.out.read_text().splitlines():
            row = json.loads(line)
            done.add((row["task"], row["arm"], row["seed"]))
    makers = {"answer": (answer_rows, args.xquad), "recall": (recall_rows, args.text),
              "text": (text_rows, args.text)}  # fmt: skip
    for task in args.tasks:
        maker, path = makers[task]
        held = maker(path, tokenizer, args.length, True, 0)[: args.held]
        for seed in args.seeds:
            train = maker(path, tokenizer, args.length, False, seed)
            for name in args.arms:
                if (task, name, seed) in done or (task != "text" and name == "loss subsampling"):
                    continue
                for row in run(args, task, name, seed, (train, held), speeds.get(name, 1.0)):
                    with args.out.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                    print(f"{task:<8}{name:<28}seed {seed}  {row['at']:<6}step {row['step']:<4}"
                          f"loss {row['loss']:.4f}  exact {row['exact']:.3f}  "
                          f"{row['cpu_seconds_per_step']:.2f} s", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
