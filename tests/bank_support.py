"""A small base and banks of random experts over it."""

from typing import Any

import torch

from mnemic.models.adapter_rules import Expert
from mnemic.models.adapters import AdapterBank
from mnemic.models.tiny import byte_tokenizer, tiny_llama

TOKENIZER = byte_tokenizer(256)
SETTINGS = {
    "eos_id": TOKENIZER.eos_token_id, "pad_id": TOKENIZER.pad_token_id, "max_new_tokens": 12,
}  # fmt: skip
EXTRACT, UPDATE, GENERATE = "mem_extract", "mem_update", "mem_generate"
IDS = torch.arange(40, 47)[None]


def base(seed: int = 0) -> Any:
    """Weights so wide that each change of them changes the text."""
    model = tiny_llama(TOKENIZER, hidden_size=32, layers=2, heads=4, max_position=256, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.3, generator=generator)
    return model


def randomize(bank: AdapterBank, seed: int = 1) -> AdapterBank:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in bank.model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.3, generator=generator)
    return bank


def bank_of(*operations: str, model: Any = None, **changes: Any) -> AdapterBank:
    names = operations or (EXTRACT, UPDATE, GENERATE)
    ranks = {name: 4 + 2 * i for i, name in enumerate(names)}
    experts = {op: Expert(**{"r": r, "alpha": 8, **changes}) for op, r in ranks.items()}
    return randomize(AdapterBank(model or base(), experts))


def logits(bank: AdapterBank, operation: str | None) -> torch.Tensor:
    with torch.no_grad(), bank.use(operation):
        return bank.model(input_ids=IDS).logits
