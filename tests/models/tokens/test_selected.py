"""Gradients through selected tokens, and through selected neurons: the forward stays exact."""

from typing import Any

import architectures as a
import pytest
import torch
from torch import nn

from mnemic.models.tokens.config import TokensConfig
from mnemic.models.tokens.sparsity import TokenSparsity

BATCHES = {
    "whole": lambda: {"input_ids": a.ids(2, 50)},
    "padded": lambda: a.padded([50, 31]),
    "packed": lambda: a.packed([20, 17, 13]),
}


def begin(model: Any, inputs: Any, **settings: Any) -> TokenSparsity:
    config = TokensConfig(
        layers="all", score="random", block=1, sinks=0, recent=0, grad="selected", protect=False,
        **settings,
    )  # fmt: skip
    sparsity = TokenSparsity(model, config)
    assert sparsity.begin(inputs, torch.zeros_like(inputs["input_ids"], dtype=torch.bool))
    return sparsity


@pytest.mark.parametrize("kind", a.CONFIGS)
@pytest.mark.parametrize("batch", BATCHES)
def test_selecting_all_is_the_dense_backward(kind: str, batch: str) -> None:
    inputs = BATCHES[batch]()
    model = a.small(kind)
    loss, grads = a.gradients(model, inputs)
    begin(model, inputs, keep=1.0)
    found, others = a.gradients(model, inputs)
    torch.testing.assert_close(found, loss, rtol=1e-6, atol=0)
    a.close(others, grads, 3e-6)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_half_the_tokens_have_the_gradient_of_the_definition(
    batch: str, checkpointing: bool
) -> None:
    """Against the dense graph in which every token-wise output of an unselected token is a
    constant.
    """
    inputs = BATCHES[batch]()
    model = a.small("llama")
    dense, _ = a.gradients(model, inputs)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    sparsity = begin(model, inputs, keep=0.5)
    loss, grads = a.gradients(model, inputs)
    torch.testing.assert_close(loss, dense, rtol=1e-6, atol=0)  # the forward is exact
    assert sparsity.forward is not None
    reference = a.small("llama")
    chosen = torch.zeros(inputs["input_ids"].shape, dtype=torch.bool)
    chosen.scatter_(1, sparsity.forward.index[0], True)
    assert 0.3 < float(chosen.float().mean()) < 0.6

    def constant(module: Any, args: Any, out: Any) -> Any:
        return torch.where(chosen[..., None], out, out.detach())

    for layer in reference.model.layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear) or type(module).__name__.endswith("Norm"):
                module.register_forward_hook(constant)
        layer.register_forward_hook(constant)
        layer.register_forward_pre_hook(
            lambda m, args: (torch.where(chosen[..., None], args[0], args[0].detach()),)
        )
    _, expected = a.gradients(reference, inputs)
    a.close(grads, expected, 3e-6)


def test_saved_is_the_selected_part_and_keys_and_values() -> None:
    inputs = {"input_ids": a.ids(1, 192)}

    def saved(keep: float | None) -> int:
        model = a.small("llama")
        if keep is not None:
            begin(model, inputs, keep=keep)
        found: dict[int, Any] = {}
        own = {p.untyped_storage()._cdata for p in model.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                found[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model.model(**inputs, use_cache=False)
        return sum(s.nbytes() for s in found.values())

    keys_and_values = 4 * 2 * 192 * 16 * 4
    # No term in selected x all: that would be 4 layers x 48 x 192 x 4 bytes and more.
    assert saved(0.25) < 0.3 * saved(None) + 1.5 * keys_and_values


def frozen_llama() -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(a.small("llama"), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def test_pruned_neurons() -> None:
    """All neurons: the exact gradient. Some: the exact loss and less saved."""
    inputs = {"input_ids": a.ids(2, 50)}
    model = frozen_llama()
    loss, grads = a.gradients(model, inputs)
    cosines = []
    for keep in (1.0, 0.5, 0.1):
        model = frozen_llama()
        config = TokensConfig(
            keep=1.0, layers="all", scope="attention", score="random", block=1, sinks=0, recent=0,
            protect=False, loss="all", mlp_backward_keep=keep,
        )  # fmt: skip
        sparsity = TokenSparsity(model, config)
        assert sparsity.begin(inputs, torch.zeros(2, 50, dtype=torch.bool))
        found, others = a.gradients(model, inputs)
        torch.testing.assert_close(found, loss, rtol=1e-6, atol=0)
        if keep == 1.0:
            a.close(others, grads, 3e-6)
        x, y = (torch.cat([g.flatten() for g in each.values()]) for each in (grads, others))
        cosines.append(float(torch.nn.functional.cosine_similarity(x, y, 0)))
    assert cosines[0] > 0.99999 and cosines[1] > cosines[2] and cosines[1] < 0.99999


def test_trained_mlps_are_refused() -> None:
    config = TokensConfig(scope="attention", mlp_backward_keep=0.5)
    with pytest.raises(ValueError, match="frozen"):
        TokenSparsity(a.small("llama"), config)
    with pytest.raises(ValueError, match="gate_proj"):
        TokenSparsity(a.small("opt"), config)
