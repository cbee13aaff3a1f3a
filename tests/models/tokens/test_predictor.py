"""Pattern predictors: what they learn, what pruning takes away, and that they are a score."""

from pathlib import Path
from typing import Any

import architectures as a
import pytest
import torch

from mnemic.models.tokens.config import TokensConfig
from mnemic.models.tokens.predictor import (
    PatternPredictor,
    Predictors,
    flops,
    load_predictors,
    save_predictors,
)
from mnemic.models.tokens.predictor_fit import _train, fit, observe, overlap, prune, recall
from mnemic.models.tokens.sparsity import TokenSparsity


def structured(**changes: Any) -> Any:
    """A small model whose attention is loud at some tokens, 3 to 19, wherever they are."""
    model = a.small("llama", **changes)
    with torch.no_grad():
        embeddings = model.model.embed_tokens.weight
        embeddings[:, 0] = 0.1
        embeddings[3:20, 1] = 0.3
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight[:, 0] += 1
            layer.self_attn.k_proj.weight[:, 1] += 1
    return model


def trained(model: Any, layers: list[int], steps: int = 3, **changes: Any) -> Predictors:
    settings: dict[str, Any] = {"block": 4, "rank": 8, "lr": 1e-2, **changes}
    return fit(model, [a.ids(4, 64, seed) for seed in range(8)], layers, steps=steps, **settings)


def test_fit_recalls_more_than_chance_and_than_places() -> None:
    model = structured()
    predictors = trained(model, [1, 3], steps=60)
    held = a.ids(8, 64, seed=99)
    found = recall(predictors, model, held, 0.5)
    untrained = recall(trained(model, [1, 3], steps=0), model, held, 0.5)
    places: dict[int, torch.Tensor] = {}
    fixed: dict[int, float] = {}

    def learn(index: int, hidden: torch.Tensor, truth: torch.Tensor) -> None:
        places[index] = truth.sum(1).mean(0, keepdim=True).expand(8, -1)

    def compare(index: int, hidden: torch.Tensor, truth: torch.Tensor) -> None:
        fixed[index] = overlap(places[index], truth.sum(1), 0.5)

    observe(model, a.ids(32, 64, 1), [1, 3], 4, learn)
    observe(model, held, [1, 3], 4, compare)
    for layer in (1, 3):
        assert found[layer] > 0.8 > 0.7 > max(fixed[layer], untrained[layer])
    # The model is left as it was, and the same seed gives the same predictors.
    assert model.training and not any(layer._forward_pre_hooks for layer in model.model.layers)
    torch.manual_seed(5)
    again = trained(model, [1, 3], steps=60)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in predictors.state_dict().items())


def test_overlap_is_the_share_of_the_true_top() -> None:
    truth = torch.tensor([[4.0, 3, 2, 1], [1, 2, 3, 4]])
    assert overlap(truth, truth, 0.5) == 1
    assert overlap(-truth, truth, 0.5) == 0
    assert overlap(torch.tensor([[4.0, 3, 2, 1]] * 2), truth, 0.75) == pytest.approx(5 / 6)


def test_pruning_takes_out_dead_units_and_nothing_else() -> None:
    torch.manual_seed(0)
    predictor = PatternPredictor(32, (12, 12), 8, 4)
    with torch.no_grad():
        predictor.key.into.bias[[1, 5]] = -100.0
    x, scale = torch.randn(3, 21, 32), torch.ones(3, 21, 1)
    before, (_, units) = predictor.map(x, scale)
    dead = (units == 0).float().mean((0, 1))
    assert sorted((dead == 1).nonzero()[:, 0].tolist()) == [1, 5]
    kept = predictor.key.into.weight[[i for i in range(12) if i not in (1, 5)]]
    size = sum(p.numel() for p in predictor.parameters())
    assert prune(predictor.key, dead, 0.999) == 2
    assert torch.equal(predictor.key.into.weight, kept) and predictor.units == (12, 10)
    assert sum(p.numel() for p in predictor.parameters()) == size - 2 * (32 + 1 + 2 * 8)
    torch.testing.assert_close(predictor.map(x, scale)[0], before, rtol=1e-6, atol=1e-6)
    last = predictor.key.into.weight[[3]]
    dead = torch.full((10,), 0.9)
    dead[3] = 0.85
    assert prune(predictor.key, dead, 0.8) == 9  # the least dead one stays
    assert torch.equal(predictor.key.into.weight, last)
    assert prune(predictor.query, torch.full((12,), 0.8), 0.8) == 0


def test_standardised_inputs_are_folded_into_the_projection() -> None:
    x = torch.randn(4, 64, 32, generator=torch.Generator().manual_seed(0))
    x = x * torch.linspace(0.1, 10, 32) + torch.linspace(-1, 2, 32)
    predictor = PatternPredictor(32, (16, 16), 8, 4)
    bias = predictor.key.into.bias.detach().clone()
    _train(predictor, [x], [torch.rand(4, 16, 16).tril()], 0, 1e-2, 0, 0.0)
    flat, into = x.flatten(0, 1), predictor.key.into
    rows = into.weight * flat.std(0, correction=0)
    torch.testing.assert_close(rows @ rows.T, torch.eye(16), rtol=0, atol=1e-4)
    torch.testing.assert_close(into.bias + into.weight @ flat.mean(0), bias, rtol=0, atol=1e-4)


SHRINK: dict[str, Any] = {"steps": 60, "lr": 3e-2, "shrink": 3.0}


def test_fit_prunes_what_is_not_worth_its_activation() -> None:
    model = structured()
    predictors = trained(model, [2], **SHRINK)
    query, key = predictors.of(2).units
    assert min(query, key) >= 1 and query + key < 20
    whole = PatternPredictor(32, (16, 16), 8, 4)
    assert predictors.before_pruning == sum(p.numel() for p in whole.parameters())
    assert predictors.size < 0.7 * predictors.before_pruning
    assert recall(predictors, model, a.ids(8, 64, 99), 0.5)[2] > 0.8


def test_padding_takes_no_part_and_blocks_may_be_cut() -> None:
    predictor = PatternPredictor(32, (8, 8), 8, 4)
    hidden = torch.randn(1, 10, 32)
    valid = torch.arange(17)[None] < 10
    longer = torch.cat([hidden, torch.randn(1, 7, 32)], 1)
    found = predictor(longer, valid)
    torch.testing.assert_close(found[:, :3, :3], predictor(hidden))
    assert not found[:, 3:].any() and not found[:, :, 3:].any()
    # Causal, and of the direction of hidden states only.
    assert not predictor(hidden).triu(1).any()
    torch.testing.assert_close(predictor(hidden * 7), predictor(hidden))


def test_a_file_gives_the_same_predictors_and_fits_one_model(tmp_path: Path) -> None:
    model, path = structured(), tmp_path / "p.safetensors"
    predictors = trained(model, [1, 2], **SHRINK)
    assert predictors.of(1).units != predictors.of(2).units
    save_predictors(path, predictors)
    found = load_predictors(path, model)
    assert found.state_dict().keys() == predictors.state_dict().keys()
    assert all(torch.equal(v, found.state_dict()[k]) for k, v in predictors.state_dict().items())
    assert (found.block, found.before_pruning) == (4, predictors.before_pruning)
    ids = a.ids(2, 32)
    assert recall(found, model, ids, 0.5) == recall(predictors, model, ids, 0.5)
    with pytest.raises(
        ValueError, match="hidden states of 32 and layers up to 2; this model has 16"
    ):
        load_predictors(path, structured(hidden_size=16))
    with pytest.raises(ValueError, match="this model has 32 and 2 layers"):
        load_predictors(path, structured(num_hidden_layers=2))
    with pytest.raises(ValueError, match="cannot read predictors"):
        load_predictors(tmp_path / "none", model)
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match="cannot read predictors"):
        load_predictors(tmp_path / "text", model)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="holds no predictors"):
        load_predictors(tmp_path / "other", model)


@pytest.mark.parametrize("kind", a.CONFIGS)
def test_a_score_on_every_architecture(kind: str) -> None:
    """Also under checkpointing, where a recomputed layer has the same tokens."""
    predictors = trained(a.small(kind), [1, 2], steps=2)
    inputs = a.padded([50, 31])
    config = TokensConfig(keep=0.4, layers=(1, 3), block=4, share=1)
    predicting = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    predicting[:, 28:30] = True
    results = []
    for checkpointing in (False, True):
        model = a.small(kind)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        sparsity = TokenSparsity(model, config, score=predictors)
        assert sparsity.begin(inputs, predicting)
        results.append((a.gradients(model, inputs), sparsity.forward, sparsity.report()))
    ((loss, grads), first, report), ((other, others), second, _) = results
    assert report["tokens/kept_layer_1"] < 0.75
    assert first is not None and second is not None
    assert all(torch.equal(index, second.index[i]) for i, index in first.index.items())
    assert torch.equal(loss, other)
    a.close(others, grads, 1e-6)


def test_mistakes_are_said() -> None:
    model = structured()
    predictors = trained(model, [1], steps=1)
    inputs = {"input_ids": a.ids(1, 40)}
    nothing = torch.zeros(1, 40, dtype=torch.bool)
    for layers, block, message in (((2, 3), 4, "layer 2, but for 1"), ((1, 2), 8, "block=4")):
        sparse = a.small("llama")
        config = TokensConfig(layers=layers, block=block)
        TokenSparsity(sparse, config, score=predictors).begin(inputs, nothing)
        with pytest.raises(ValueError, match=message):
            sparse(**inputs, use_cache=False)
    with pytest.raises(ValueError, match="at least one batch"):
        fit(model, [], [1])
    with pytest.raises(ValueError, match="multiple of 4"):
        fit(model, [a.ids(1, 8)], [1], rank=6)


def test_flops_are_those_of_the_matrices() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    predictor = PatternPredictor(32, (12, 10), 8, 4)
    counter = FlopCounterMode(display=False)
    with counter:
        predictor(torch.randn(1, 64, 32))
    assert counter.get_total_flops() == flops(32, 64, (12, 10), 8, 4)
