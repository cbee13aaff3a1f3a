"""The body's Linear weights in int8 and back: which weights of a model become `Int8Weight`.

Embeddings, the output head, norms and biases stay as they are: they are read element by element or
decide the logits, and Q-GaLore (arXiv 2407.08296) leaves them alone as well.
"""

import torch
from torch import Tensor, nn

from mnemic.optim.int8 import GROUP, Int8Weight
from mnemic.optim.select import roles


def quantize_body(model: nn.Module, group: int = GROUP) -> int:
    """Replace the trainable weights of the body's `nn.Linear` modules by trainable int8 ones, in
    place and one at a time; returns how many. Call it before the optimizer is built. ValueError
    where there is none, or where one cannot be int8.
    """
    chosen = {name for name, role in roles(model).items() if role == "matrix"}
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    count = 0
    for name, param in list(model.named_parameters()):
        if name not in chosen or id(param) not in linear or isinstance(param, Int8Weight):
            continue
        try:
            made = nn.Parameter(Int8Weight.quantize(param.detach(), group))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        _replace(model, param, made)
        count += 1
    if not count:
        raise ValueError("the model has no trainable nn.Linear weight in its body to hold as int8")
    return count


def dequantize_body(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Put ordinary parameters back, in `dtype` or else each one's compute dtype; in place. An
    optimizer built before still holds the int8 ones.
    """
    for param in list(model.parameters()):
        if isinstance(param, Int8Weight):
            _replace(model, param, nn.Parameter(param.dequantize(dtype), param.requires_grad))
    return model


def dense_state(model: nn.Module) -> dict[str, Tensor] | None:
    """The model's state_dict with dense weights, the model left as it is; None where no weight is
    int8. It takes the bytes of the dense body besides those of the model.
    """
    if not any(isinstance(param, Int8Weight) for param in model.parameters()):
        return None
    return {
        name: value.dequantize() if isinstance(value, Int8Weight) else value
        for name, value in model.state_dict().items()
    }


def _replace(model: nn.Module, old: Tensor, new: nn.Parameter) -> None:
    """`new` wherever a module of the model owns `old`: a weight may be shared."""
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if param is old:
                setattr(module, name, new)
