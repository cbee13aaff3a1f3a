"""One arm of `bench_tokens.py`, in a fresh process: saved bytes, peak and time of a training step.

Prints one JSON line. `--model layers`: a Llama of 12 layers of 256, vocabulary 2048, fp32;
`smollm2`: SmolLM2-135M in bf16. LoRA r=8 on q, k, v, o in both. A row is `--length` tokens, of
which the last 128 are trained (`--loss answer`) or all (`--loss all`).
"""

import argparse
import json
import time
from typing import Any

import torch

from mnemic.models.exact.attention import decoder_layers
from mnemic.models.exact.loss import loss_head
from mnemic.models.exact.stream import stream_layers
from mnemic.models.exact.tiles import tile_mlps
from mnemic.models.lora import add_lora
from mnemic.models.tokens.sparsity import TokenSparsity
from mnemic.train.callbacks.memory import host_peak_bytes, reset_host_peak
from mnemic.train.callbacks.tokens import SavedBytes
from mnemic.train.data.collate import Batch, collate
from mnemic.train.data.tokenize import Example
from mnemic.train.objectives.tokens import token_loss
from mnemic.train.recipe.tokens import Drop, Lemo, Protect, RandomLtd, TokenTune
from mnemic.train.tokens import to_config

ANSWER = 128
EXACT = {"checkpoint", "loss"}
ARMS: dict[str, tuple[set[str], Any]] = {
    # What is saved exactly, and which token sparsity.
    "dense": (set(), None),
    "dense, peft's fp32 adapters": ({"fp32_adapters"}, None),
    "checkpoint": ({"checkpoint"}, None),
    "loss without logits": ({"loss"}, None),
    "checkpoint + loss": (EXACT, None),
    "checkpoint + loss + tiled mlp": (EXACT | {"tile"}, None),
    "sequence chunks + loss": ({"stream", "loss"}, None),
    "token_tune": ({"loss"}, TokenTune()),
    "random-ltd": (EXACT, RandomLtd(ramp=0.0, dense_end=0.0)),
    "lemo, no checkpoint": ({"loss"}, Lemo()),
    "lemo": (EXACT, Lemo()),
    "protect": (EXACT, Protect()),
    "protect, keep 0.4": (EXACT, Protect(keep=0.4)),
    "protect, keep 0.5": (EXACT, Protect(keep=0.5)),
    "drop": (EXACT, Drop()),
    "drop, no checkpoint": ({"loss"}, Drop()),
    "drop, visible": (EXACT, Drop(attend="all")),
    "drop + sequence chunks": ({"stream", "loss"}, Drop()),
    "truncation to half": (EXACT, "truncate"),
    "loss subsampling": (EXACT, "subsample"),
}


def resident_bytes() -> int:
    with open("/proc/self/status") as file:
        return next(int(x.split()[1]) * 1024 for x in file if x.startswith("VmRSS:"))


def build(kind: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    if kind == "layers":
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=2048, hidden_size=256, intermediate_size=688, num_hidden_layers=12,
                num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=16384,
            )
        )  # fmt: skip
    from mnemic.models.load import load_causal_lm
    from mnemic.models.smollm2 import ensure_smollm2

    return load_causal_lm(str(ensure_smollm2(log=lambda _: None)), dtype="bf16")


def row(arm: Any, length: int, loss: str, vocabulary: int) -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocabulary, (length,), generator=generator).tolist()
    labels = [-100, *ids[1:]]
    if loss == "answer":
        labels[:-ANSWER] = [-100] * (length - ANSWER)
    if arm == "truncate":
        ids, labels = ids[length // 2 :], [-100, *labels[length // 2 + 1 :]]
    if arm == "subsample":
        labels = [x if i % 2 else -100 for i, x in enumerate(labels)]
    return collate([Example(ids, labels, (len(ids),), len(ids))], pad_id=0, packed=False)


def naive(batch: Batch, exact: set[str]) -> Batch:
    """As transformers computes a loss from labels: logits of all positions."""
    if "loss" not in exact:
        batch.tensors.pop("logit_columns", None)
    return batch


def main() -> None:
    parser = argparse.ArgumentParser(description="One arm of bench_tokens.py.")
    parser.add_argument("arm", choices=list(ARMS))
    parser.add_argument("--model", choices=["layers", "smollm2"], default="layers")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--loss", choices=["answer", "all"], default="answer")
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args()
    exact, tokens = ARMS[args.arm]
    model = build(args.model)
    vocabulary = model.config.vocab_size
    model = add_lora(
        model, r=8, alpha=16, dropout=0.0, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        rslora=False, dora=False, quantized=False, seed=0,
        compute="fp32" if "fp32_adapters" in exact else "model",
    ).train()  # fmt: skip
    inner = model.get_base_model()
    loss_head(inner, "chunked" if "loss" in exact else "logits")
    if "tile" in exact:
        tile_mlps(model, args.length // 4)
    if "stream" in exact:
        stream_layers(model, max(512, args.length // 8))
    if "checkpoint" in exact:
        for layer in decoder_layers(model):
            layer.gradient_checkpointing = True  # type: ignore[assignment]
        model.gradient_checkpointing_enable({"use_reentrant": False})
    sparsity = None
    if tokens is not None and not isinstance(tokens, str):
        if args.loss == "all" and tokens.protect:
            tokens = tokens.model_copy(update={"protect": False})
        sparsity = TokenSparsity(model, to_config(tokens))
    batch = naive(row(tokens, args.length, args.loss, vocabulary), exact)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-4)
    counter = SavedBytes(model)
    seconds, peaks, saved = [], [], []
    for step in range(args.steps):
        torch.manual_seed(step)
        before = resident_bytes()
        reset_host_peak()
        start = time.process_time()
        with counter():
            loss = token_loss(model, batch) / batch.weight
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.process_time() - start)
        peaks.append(host_peak_bytes() - before)
        saved.append(counter.take())
    late = sorted(seconds[1:]) or seconds
    kept = sparsity.report() if sparsity else {}
    print(json.dumps({
        "saved_bytes": max(saved), "peak_bytes": max(peaks[1:] or peaks),
        "cpu_seconds": late[len(late) // 2], "loss": float(loss.detach()),
        "kept": kept.get("tokens/kept", 1.0),
        "supervised_dropped": kept.get("tokens/supervised_dropped", 0.0),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
