"""Layers in chunks of the sequence: the loss and gradients of whole layers."""

import copy

import architectures as a
import pytest
import torch

from mnemic.models.exact.stream import stream_layers


@pytest.mark.parametrize("kind", a.CONFIGS)
@pytest.mark.parametrize("batch", ["whole", "padded", "packed"])
def test_equals_whole_layers(kind: str, batch: str) -> None:
    model = a.small(kind)
    inputs = {
        "whole": {"input_ids": a.ids(2, 50)},
        "padded": a.padded([50, 31]),
        "packed": a.packed([20, 17, 13]),
    }[batch]
    loss, grads = a.gradients(model, inputs)
    stream_layers(model, 16)
    chunked_loss, chunked = a.gradients(model, inputs)
    torch.testing.assert_close(chunked_loss, loss, rtol=1e-6, atol=0)
    a.close(chunked, grads, 3e-6)


def test_eager_and_evaluation() -> None:
    model = a.small("llama", attention="eager")
    inputs = a.padded([50, 31])
    loss, grads = a.gradients(model, inputs)
    with torch.no_grad():
        logits = model(**inputs).logits
    stream_layers(model, 16)
    chunked_loss, chunked = a.gradients(model, inputs)
    torch.testing.assert_close(chunked_loss, loss, rtol=1e-6, atol=0)
    a.close(chunked, grads, 3e-6)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs, use_cache=False).logits, logits)
    ids = a.ids(1, 40)
    model.eval()
    whole = copy.deepcopy(a.small("llama", attention="eager")).eval()
    assert torch.equal(
        model.generate(ids, max_new_tokens=8, do_sample=False),
        whole.generate(ids, max_new_tokens=8, do_sample=False),
    )


def test_saves_layer_inputs_only_and_dropout_repeats() -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_dropout=0.3, target_modules=["q_proj", "v_proj", "down_proj"])
    model = get_peft_model(a.small("llama"), config)
    stream_layers(model.get_base_model(), 16)
    sizes: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter) and tensor.ndim == 3:
            sizes.append(tensor.numel())
        return tensor

    # The same random numbers in forward and backward: a finite difference agrees.
    inputs = {"input_ids": a.ids(1, 50)}
    target = model.get_base_model().model.layers[0].self_attn.v_proj.lora_B["default"].weight
    model.double()

    def loss() -> torch.Tensor:
        torch.manual_seed(5)
        logits = model(**inputs, use_cache=False).logits[0, :-1]
        return torch.nn.functional.cross_entropy(logits, inputs["input_ids"][0, 1:])

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        value = loss()
    value.backward()
    assert sizes.count(50 * 32) >= 4  # each layer's input
    assert max(sizes) <= 50 * 96  # no layer's inside, which has 50 * 48 and more of it
    assert len([s for s in sizes if s == 50 * 48]) == 0
    with torch.no_grad():
        step = torch.zeros_like(target)
        step[3, 1] = 1e-5
        target += step
        after = loss()
    assert target.grad is not None
    assert float((after - value).detach()) / 1e-5 == pytest.approx(
        float(target.grad[3, 1]), rel=5e-3
    )


def test_flash_is_refused() -> None:
    model = a.small("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(ValueError, match="flash_attention_2"):
        stream_layers(model, 16)
