"""Greedy generation for evaluation and `mnemic generate`."""

from typing import Any

import torch


@torch.no_grad()
def generate_greedy(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
) -> list[str]:
    """The continuation of each prompt (token ids), special tokens removed, in the prompts' order.

    Prompts run in batches of similar length, padded on the left.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts = [""] * len(prompts)
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        for i in range(0, len(order), batch_size):
            chunk = order[i : i + batch_size]
            length = max(len(prompts[j]) for j in chunk)
            ids = torch.full((len(chunk), length), tokenizer.pad_token_id, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, j in enumerate(chunk):
                ids[row, length - len(prompts[j]) :] = torch.tensor(prompts[j])
                mask[row, length - len(prompts[j]) :] = 1
            output = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
            for row, j in enumerate(chunk):
                texts[j] = tokenizer.decode(output[row, length:], skip_special_tokens=True)
    finally:
        model.train(was_training)
    return texts
