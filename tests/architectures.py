"""Nine small decoders of transformers, one for each way of writing a layer."""

from typing import Any

import torch

SMALL = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "qwen2": SMALL,
    "qwen3": {**SMALL, "head_dim": 8},
    "mistral": {**SMALL, "sliding_window": 24},
    "gemma3_text": {**SMALL, "head_dim": 8, "sliding_window": 24, "query_pre_attn_scalar": 8},
    "phi3": {**SMALL, "sliding_window": None},
    "opt": {
        **{k: v for k, v in SMALL.items() if k not in ("intermediate_size", "num_key_value_heads")},
        "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0,
    },
    "gpt_neox": {**SMALL, "rotary_pct": 0.5},
    "gpt2": {
        "vocab_size": 96, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 256,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    },
}  # fmt: skip


def small(kind: str, *, attention: str = "sdpa", **changes: Any) -> Any:
    """A causal LM with random weights that are a function of nothing."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **{**CONFIGS[kind], **changes})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.train()


def ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(lengths: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Right-padded rows with their mask."""
    found = ids(len(lengths), max(lengths), seed)
    mask = torch.zeros_like(found)
    for row, length in enumerate(lengths):
        mask[row, :length] = 1
    return {"input_ids": found * mask, "attention_mask": mask}


def packed(lengths: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Documents in one row, each with positions from 0."""
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return {"input_ids": ids(1, sum(lengths), seed), "position_ids": positions}


def gradients(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, Any]]:
    """Loss over everything that is no padding, and the gradient of each parameter."""
    model.zero_grad(set_to_none=True)
    logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    targets = inputs["input_ids"][:, 1:]
    if "attention_mask" in inputs:
        targets = targets.masked_fill(inputs["attention_mask"][:, 1:] == 0, -100)
    loss = torch.nn.functional.cross_entropy(
        logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="sum"
    )
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def close(found: dict[str, Any], expected: dict[str, Any], relative: float) -> None:
    """Each gradient within `relative` of its norm, or of a hundredth of the largest (the bias of
    keys has a gradient of 0 that is all round-off).
    """
    assert found.keys() == expected.keys()
    floor = 0.01 * max(value.norm() for value in expected.values())
    for name, value in expected.items():
        error = (found[name] - value).norm() / torch.maximum(value.norm(), floor)
        assert error <= relative, f"{name}: {float(error):.2e}"
