"""Greedy generation for evaluation and `mnemic generate`."""

from typing import Any

from mnemic.models.generation import generate


def generate_greedy(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
) -> list[str]:
    """The continuation of each prompt (token ids), special tokens removed, in the prompts'
    order.
    """
    found = generate(
        model, prompts, eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id,
        max_new_tokens=max_new_tokens, batch_size=batch_size,
    )  # fmt: skip
    return [tokenizer.decode(one.ids, skip_special_tokens=True) for one in found]
