"""Batched generation with transformers' own `generate`, whose samples do not depend on the batch.

A row's random numbers come from a generator of its own, one for each token, and choose by the
inverse of the cumulated probabilities: the same seed gives the same text whatever else is in the
batch, on whatever rank, up to the rounding of logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Generated:
    """Token ids of a continuation, the end token included where it came; `cut` where it did not."""

    ids: list[int]
    cut: bool


class Draws:
    """A logits processor that leaves one token of each row, drawn from the softmax: token n of row
    i by the n-th number of the stream of `seeds[i]`.
    """

    def __init__(self, seeds: Sequence[int], count: int, temperature: float) -> None:
        self.temperature, self.calls = temperature, 0
        rows = []
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed & (2**63 - 1))
            rows.append(torch.rand(count, generator=generator, dtype=torch.float64))
        self.numbers = torch.stack(rows)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        del input_ids
        at = self.numbers[:, self.calls, None].to(scores.device)
        self.calls += 1
        # In fp64: the sum over a large vocabulary is not 1 in fp32.
        cumulated = (scores.float() / self.temperature).softmax(-1).double().cumsum(-1)
        chosen = torch.searchsorted(cumulated, at * cumulated[:, -1:], right=True)
        chosen.clamp_(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[list[int]],
    *,
    eos_id: int,
    pad_id: int,
    max_new_tokens: int,
    batch_size: int = 16,
    seeds: Sequence[int] | None = None,
    temperature: float = 1.0,
    adapter_names: Sequence[str] | None = None,
) -> list[Generated]:
    """The continuation of each prompt, in their order: greedy, or sampled where `seeds` are given.

    Prompts run in batches of similar length, padded on the left. Of the model's own generation
    settings only its end tokens count: a repetition penalty would sample from another policy than
    the one that is trained. `adapter_names`: of a PeftModel, the adapter of each prompt
    (`__base__`: none), in mixed batches.
    """
    from transformers import GenerationConfig

    ends = _ends(model, eos_id)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, use_cache=True, pad_token_id=pad_id,
        eos_token_id=sorted(ends),
    )  # fmt: skip
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = plain.generation_config
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    found: list[Generated] = [Generated([], True)] * len(prompts)
    device = next(model.parameters()).device
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    plain.generation_config = config
    try:
        for i in range(0, len(order), batch_size):
            chunk = order[i : i + batch_size]
            length = max(len(prompts[j]) for j in chunk)
            ids = torch.full((len(chunk), length), pad_id, dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, j in enumerate(chunk):
                ids[row, length - len(prompts[j]) :] = torch.tensor(prompts[j])
                mask[row, length - len(prompts[j]) :] = 1
            rows = {"adapter_names": [adapter_names[j] for j in chunk]} if adapter_names else {}
            draws = seeds and [Draws([seeds[j] for j in chunk], max_new_tokens, temperature)]
            output = model.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=config,
                logits_processor=draws or None, **rows,
            )  # fmt: skip
            for row, j in enumerate(chunk):
                new = output[row, length:].tolist()
                stop = next((n for n, token in enumerate(new) if token in ends), None)
                found[j] = Generated(new if stop is None else new[: stop + 1], stop is None)
    finally:
        plain.generation_config = own
        for module, training in modes:
            module.training = training
    return found


def _ends(model: Any, eos_id: int) -> set[int]:
    """The tokenizer's end token and the model's: Gemma, for one, ends a turn by another."""
    config = getattr(model, "generation_config", None)
    own = getattr(config, "eos_token_id", None)
    more = own if isinstance(own, list) else [own]
    return {eos_id, *(token for token in more if token is not None)}
