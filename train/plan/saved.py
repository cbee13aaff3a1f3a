"""Bytes that autograd saves for the backward, by the part of the model that saves them.

Storages are counted once, when the first tensor in them is packed, for the innermost module that
was running; weights and buffers do not count. The same counter runs over real tensors and over fake
ones, and tests/train/test_plan_activations.py shows that both give the same bytes.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

INPUTS, HEAD, OTHER = "layer inputs", "head and loss", "other"
COMPONENTS: tuple[str, ...] = (
    "embedding", "attention", "MLP", "norms", "adapters", HEAD, INPUTS, OTHER,
)  # fmt: skip

# The innermost part of a module's name that matches says what it is, tried in this order:
# `self_attn.q_norm` is a norm, `self_attn.q_proj.lora_A.default` an adapter.
_PARTS = (
    ("adapters", r"lora_|adapter"),
    ("norms", r"norm|^ln_|_ln$"),
    ("attention", r"attn|attention|rotary"),
    ("MLP", r"mlp|^fc\d?$|feed_forward|ffn|expert|moe"),
    (HEAD, r"lm_head|embed_out"),
    ("embedding", r"embed|^wte$|^wpe$"),
)


def component_of(name: str) -> str | None:
    """What a module of this full name is part of; None where the name does not tell."""
    for part in reversed(name.lower().split(".")):
        for component, pattern in _PARTS:
            if re.search(pattern, part):
                return component
    return None


def components(model: nn.Module) -> dict[nn.Module, str]:
    """Each module's component.

    What a decoder layer or the stack of them saves by itself is its input, where it is recomputed;
    what is saved outside the stack belongs to head and loss.
    """
    from mnemic.train.objectives.tokens import base_of

    stack = getattr(base_of(model), "base_model", None)
    inside = set() if stack is None else set(stack.modules())
    found: dict[nn.Module, str] = {}
    for name, module in model.named_modules():
        layer = module is stack or (module in inside and name.rsplit(".", 1)[-1].isdigit())
        unknown = INPUTS if layer else OTHER if module in inside else HEAD
        # A peft wrapper names everything below it `base_model.model...`, which matches nothing.
        found[module] = component_of(name) or unknown
    return found


class Saved:
    """What was packed and is still held, once a storage."""

    def __init__(self, model: nn.Module) -> None:
        own = (*model.parameters(), *model.buffers())
        self._own = {tensor.untyped_storage()._cdata for tensor in own}
        self._seen: dict[int, tuple[Any, str, int]] = {}
        self.running: list[str] = []

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._seen.get(key)
        # An address whose storage is gone is another storage's now.
        if key not in self._own and (known is None or known[0]() is None):
            component = self.running[-1] if self.running else HEAD
            if component == INPUTS and not tensor.is_floating_point():
                component = OTHER  # the mask of a dropout between the parts of a layer
            self._seen[key] = ref(storage), component, storage.nbytes()
        return tensor

    def by_component(self) -> dict[str, int]:
        """Bytes held now, every component there; call it between forward and backward."""
        found: dict[str, int] = dict.fromkeys(COMPONENTS, 0)
        for storage, component, nbytes in self._seen.values():
            if storage() is not None:
                found[component] += nbytes
        return found


@contextmanager
def counting(model: nn.Module) -> Iterator[Saved]:
    """Count what is saved inside the block: the forward of `model` and what makes its loss."""
    saved, handles = Saved(model), []
    for module, component in components(model).items():

        def enter(*_: Any, component: str = component) -> None:
            saved.running.append(component)

        def leave(*_: Any) -> None:
            saved.running.pop()

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            yield saved
    finally:
        for handle in handles:
            handle.remove()
