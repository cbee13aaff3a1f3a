"""Gradients through selected tokens, and through selected neurons: the forward stays exact."""

from typing import Any

import architectures as a
import pytest
import torch
from torch import nn

from mnemic.models.exact.attention import capture, plain_forward
from mnemic.models.tokens import selected
from mnemic.models.tokens.config import TokensConfig
from mnemic.models.tokens.rows import take
from mnemic.models.tokens.selected import cut_call
from mnemic.models.tokens.sparsity import TokenSparsity

BATCHES = {
    "whole": lambda: {"input_ids": a.ids(2, 50)},
    "padded": lambda: a.padded([50, 31]),
    "packed": lambda: a.packed([20, 17, 13]),
}


def begin(model: Any, inputs: Any, **settings: Any) -> TokenSparsity:
    config = TokensConfig(
        layers="all", block=1, sinks=0, recent=0, grad="selected", protect=False,
        **{"score": "random", **settings},
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
@pytest.mark.parametrize("score", ["random", "attention", "lemo"])
@pytest.mark.parametrize("kept", [0, 1 << 30], ids=["again", "once"])
def test_half_the_tokens_have_the_gradient_of_the_definition(
    batch: str, score: str, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the dense graph in which every token-wise output of an unselected token is a
    constant. The attention is computed again in its backward, or once.
    """
    monkeypatch.setattr(selected, "_KEPT", kept)
    monkeypatch.setattr(selected, "_QUERIES", 7)
    inputs = BATCHES[batch]()
    model = a.small("llama")
    dense, _ = a.gradients(model, inputs)
    sparsity = begin(model, inputs, keep=0.5, score=score)
    loss, grads = a.gradients(model, inputs)
    assert torch.equal(loss, dense)  # the forward is exact, to the last bit
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


def test_a_layer_saves_its_input_and_runs_again_for_selected_tokens_only() -> None:
    inputs = {"input_ids": a.ids(1, 192)}
    model = a.small("llama")
    begin(model, inputs, keep=0.25)
    found: dict[int, Any] = {}
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    rows: list[int] = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda m, args, out: rows.append(args[0].shape[1]))

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        hidden = model.model(**inputs, use_cache=False).last_hidden_state
    hidden.sum().backward()
    # Four inputs; and what the last norm keeps.
    assert sum(s.nbytes() for s in found.values()) < 7 * 192 * 32 * 4
    assert rows == [192] * 4 + [48] * 4


def test_what_supervised_tokens_attend_to_is_selected() -> None:
    """A layer whose queries look at one place: gradients go there."""
    inputs = {"input_ids": a.ids(1, 64)}
    model = a.small("llama")
    config = TokensConfig(
        keep=0.25, layers="all", block=4, sinks=0, recent=0, grad="selected", score="attention"
    )
    sparsity = TokenSparsity(model, config)
    predicting = torch.zeros(1, 64, dtype=torch.bool)
    predicting[0, 60:63] = True
    assert sparsity.begin(inputs, predicting)
    a.gradients(model, inputs)
    assert sparsity.forward is not None and sparsity.forward.mass is not None
    kept, mass = sparsity.kept[0], sparsity.forward.mass[0]
    assert bool(kept[60:].all()) and int(kept.sum()) == 16
    blocks = mass.view(16, 4).mean(1)[:15]
    assert kept.view(16, 4)[:15][blocks.topk(3).indices].all()
    # Heads times queries times layers past the first quarter: each query's attention sums to 1.
    assert float(mass.sum()) == pytest.approx(4 * 4 * 3, rel=1e-4)
    assert sparsity.loss_factor == 1.0 and sparsity.loss_dropped() is None


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


@pytest.mark.parametrize("heads", [1, 2, 4], ids=["one-key-head", "grouped", "all"])
def test_parts_of_the_attention_share_what_they_keep(
    heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the graphs hold is what decides about keeping them: no copy of keys for each part."""
    monkeypatch.setattr(selected, "_QUERIES", 16)
    model = a.small("llama", num_key_value_heads=heads)
    layer, length, index = model.model.layers[0], 256, torch.arange(0, 256, 2)[None]
    hidden = torch.randn(1, length, model.config.hidden_size)
    places = torch.arange(length)[None]
    named = {"position_embeddings": model.model.rotary_emb(hidden, places)}
    with torch.no_grad():
        _, keys, values, _ = capture(layer, plain_forward(layer), hidden, **named)
        query, key, value, _ = capture(
            layer, plain_forward(layer), take(hidden, index), **cut_call(named, index)
        )
    rows = selected._Rows(layer.self_attn, index, None, {"scaling": 0.3})
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        found[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    query.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = selected._Attention.apply(rows, True, query, key, value, keys, values)
    predicted = selected._kept_bytes(rows, query, length)
    assert 0.8 * predicted < sum(found.values()) < 1.2 * predicted
    again = selected._Attention.apply(rows, False, query, key, value, keys, values)
    torch.testing.assert_close(out, again, rtol=1e-6, atol=1e-6)
    assert layer.self_attn.num_key_value_groups == 4 // heads
