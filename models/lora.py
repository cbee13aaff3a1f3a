"""LoRA, DoRA and QLoRA through peft, from plain arguments."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from mnemic.models.load import LoadError


def add_lora(
    model: Any,
    *,
    r: int,
    alpha: float,
    dropout: float,
    target_modules: str | list[str],
    rslora: bool,
    dora: bool,
    quantized: bool,
    seed: int,
    freeze_a: bool = False,
    compute: str = "model",
) -> Any:
    """A PeftModel over `model`, its base frozen. A's weights are a function of `seed`; B starts at
    zero. `freeze_a`: train B only (LoRA-FA). `compute`: "model", in the type of the hidden states,
    or "fp32".
    """
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if quantized:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=alpha,  # type: ignore[arg-type]  # peft computes with floats, its annotation says int
        lora_dropout=dropout,
        target_modules=target_modules,
        use_rslora=rslora,
        use_dora=dora,
    )
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapted = get_peft_model(model, config)
    except ValueError as error:
        if "target" not in str(error).lower():
            raise
        linear = {
            n.rsplit(".", 1)[-1] for n, m in model.named_modules() if hasattr(m, "in_features")
        }
        raise LoadError(
            f"adapters.target_modules={target_modules!r} matches no layer; "
            f"take all-linear, or from {', '.join(sorted(linear))}"
        ) from error
    if compute == "model" and not dora:  # DoRA's norms want W and B A in one type
        compute_in_input_type(adapted)
    if freeze_a:
        for name, parameter in adapted.named_parameters():
            if ".lora_A." in name:
                parameter.requires_grad_(False)
    return adapted


def compute_in_input_type(model: Any) -> int:
    """Let fp32 adapters over a bf16 base take their input as it is and cast their weights to it.

    peft casts the input to the adapter's type, and the backward needs that fp32 copy: 35 % more
    saved bytes in a bf16 Llama, twice what LeMo's token elimination saves. Weights, gradients and
    optimizer states stay fp32. Returns the number of layers changed.
    """
    from peft.tuners.lora import LoraLayer

    count = 0
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False
            for part in (module.lora_A, module.lora_B):
                for linear in part.values():
                    linear.__class__ = _input_typed()
            count += 1
    return count


@lru_cache(maxsize=1)
def _input_typed() -> Any:
    from torch import nn
    from torch.nn.functional import linear

    class InputTyped(nn.Linear):
        """A linear layer that computes in the type of its input."""

        def forward(self, x: Any) -> Any:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return linear(x, self.weight.to(x.dtype), bias)

    return InputTyped


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """A PeftModel as its base. What was frozen stays frozen: peft makes every weight of the active
    adapter trainable when it is enabled again, those frozen on purpose (LoRA-FA's A) too.
    """
    trainable = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, wanted in trainable:
            parameter.requires_grad_(wanted)
