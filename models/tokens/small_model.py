"""Keep sets from a small model's attention, before the large one begins (after SpeContext: what a
small model attends to is what a large one needs).

One forward of the small model, in which each attention also notes how much the supervised queries
attend to each token. The same tokens stay in every run of layers.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mnemic.models.exact.attention import attend_rows, attending, attention_of, decoder_layers
from mnemic.models.tokens.scores import Look, attention_mass
from mnemic.models.tokens.select import Row


class ModelScore:
    """`model`: a causal LM with the large model's tokenizer; sdpa or eager attention."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval().requires_grad_(False)

    @torch.no_grad()
    def prepare(self, inputs: Mapping[str, Tensor], row: Row) -> Tensor:
        """Score (B, S) fp32 of every token, summed over the small model's layers."""
        device = inputs["input_ids"].device
        if next(self.model.parameters()).device != device:
            self.model.to(device)
        total = torch.zeros(inputs["input_ids"].shape, device=device)

        def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kw: Any):
            scale = kw.get("scaling") or query.shape[-1] ** -0.5
            total.add_(attention_mass(query, key, scale, row, mask))
            return attend_rows(module, query, key, value, mask, **kw)

        # The layers share one configuration, so one attention is all of them.
        with attending(attention_of(decoder_layers(self.model)[0]), attend):
            self.model.base_model(**inputs, use_cache=False)
        return total

    def __call__(self, look: Look) -> Tensor:
        raise AssertionError("prepared before the forward")
