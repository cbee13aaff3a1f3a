"""The run of recipes/pretrain_tiny.yaml, flat and without abstractions, for readers.

    python scripts/loop_minimal.py FILE [STEPS]

Same model, same data order, same schedule, same losses to the last bit as

    mnemic train pretrain_tiny data.path=FILE

What the loop in train/trainer.py adds: micro-batches and ranks, checkpoints and resume, signals,
evaluation, trackers, and sentences instead of tracebacks.
"""

import random
import sys

import torch
import torch.nn.functional as F

from mnemic.models.tiny import byte_tokenizer, tiny_llama
from mnemic.optim.schedules import lr_factor

SEED, BATCH, LENGTH, WINDOW = 0, 16, 256, 10_000


def train(path: str, steps: int = 300, log=print) -> list[float]:
    """Losses of all steps."""
    tokenizer = byte_tokenizer()
    model = tiny_llama(tokenizer, hidden_size=128, layers=4, heads=4, max_position=2048, seed=SEED)

    # The first nine tenths of the text, cut at a line, as one stream of bytes; rows of LENGTH,
    # permuted inside windows; what is left over begins the next pass.
    with open(path, "rb") as file:
        text = file.read()
    cut = int(0.9 * len(text))
    text = text[: text.index(b"\n", cut - 1) + 1].decode()
    ids = [*tokenizer(text, verbose=False).input_ids, tokenizer.eos_token_id]

    def rows():
        carry, number = [], 0
        while True:
            stream = carry + ids
            whole = len(stream) // LENGTH * LENGTH
            cuts = [stream[i : i + LENGTH] for i in range(0, whole, LENGTH)]
            carry = stream[whole:]
            for i in range(0, len(cuts), WINDOW):
                window = cuts[i : i + WINDOW]
                random.Random(f"{SEED}/{number}").shuffle(window)
                number += 1
                yield from window

    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=3e-3, betas=(0.9, 0.95), eps=1e-8, fused=True,
    )  # fmt: skip

    model.train()
    stream, losses = rows(), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * lr_factor(step, steps, kind="cosine", warmup=20, min_ratio=0.1)
        batch = torch.tensor([next(stream) for _ in range(BATCH)])
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        total = F.cross_entropy(
            logits.reshape(-1, logits.shape[-1]).float(), batch[:, 1:].reshape(-1), reduction="sum"
        )
        weight = BATCH * (LENGTH - 1)
        (total * (1 / weight)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(total.detach()) / weight)
        if step % 10 == 0 or step == steps - 1:
            log(f"step {step + 1}/{steps}  loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: loop_minimal.py FILE [STEPS]")
    train(sys.argv[1], *map(int, sys.argv[2:3]))
