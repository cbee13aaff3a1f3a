"""Operations of matrix products and attention, counted as they are dispatched: how much more a
technique computes than keeping everything. A causal attention is half of a full one.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_aten = torch.ops.aten


def _forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)


# torch's own table lacks the kernels for CPUs.
_CPU = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}


class Flops(TorchDispatchMode):
    """`total` grows while the mode is on."""

    total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        if packet in _CPU:
            found = _CPU[packet](*args, **kwargs)
        elif packet in flop_registry:
            found = flop_registry[packet](*args, **kwargs, out_val=out)
        else:
            return out
        self.total += found // 2 if _is_causal(func, args, kwargs) else found
        return out


def _is_causal(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    names = [argument.name for argument in func._schema.arguments]
    if "is_causal" not in names:
        return False
    position = names.index("is_causal")
    return bool(args[position] if position < len(args) else kwargs.get("is_causal", False))
