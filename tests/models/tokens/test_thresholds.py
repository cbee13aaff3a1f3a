"""Thresholds by layer: where the search starts, its budget, and that choosing obeys them."""

from pathlib import Path
from typing import Any

import architectures as a
import pytest
import torch

from mnemic.models.tokens.config import TokensConfig
from mnemic.models.tokens.predictor_fit import observe
from mnemic.models.tokens.select import Row, choose
from mnemic.models.tokens.sparsity import TokenSparsity
from mnemic.models.tokens.thresholds import profile, read_thresholds, write_thresholds

CONFIG = TokensConfig(
    keep=0.5, layers=(1, 4), score="lemo", share=1, block=4, sinks=0, recent=0, protect=False,
    loss="all",
)  # fmt: skip


def batches(count: int = 2) -> list[dict[str, Any]]:
    return [{"input_ids": a.ids(2, 64, seed)} for seed in range(count)]


def shares(model: Any, config: TokensConfig, inputs: Any) -> dict[int, float]:
    """Kept by each sparse layer in a forward with gradients."""
    sparsity = TokenSparsity(model, config)
    predicting = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
    assert sparsity.begin(inputs, predicting)
    model(**inputs, use_cache=False)
    sparsity.remove()
    report = sparsity.report()
    return {layer: report[f"tokens/kept_layer_{layer}"] for layer in sparsity.sparse}


def test_the_start_is_the_mean_relative_block_score() -> None:
    model = a.small("llama")
    found = profile(model, batches(), CONFIG, rounds=0)
    relative: dict[int, list[torch.Tensor]] = {1: [], 2: [], 3: []}

    def see(index: int, hidden: torch.Tensor, truth: torch.Tensor) -> None:
        mass = truth.sum(1)
        relative[index].append(mass / mass.amax(1, keepdim=True))

    for batch in batches():
        observe(model, batch["input_ids"], [1, 2, 3], 4, see)
    for layer, values in relative.items():
        assert found[layer] == pytest.approx(float(torch.stack(values).mean()), rel=1e-5)
    # The model is left as it was.
    assert model.training and "token_sparsity" not in model.__dict__
    assert not any(layer._forward_pre_hooks for layer in model.model.layers)


@pytest.mark.parametrize("keep", [0.3, 0.6])
def test_the_budget_holds_for_the_mean_of_the_layers(keep: float) -> None:
    model = a.small("llama")
    config = TokensConfig(**{**CONFIG.__dict__, "keep": keep})
    thresholds = profile(model, batches(3), config, rounds=1)
    assert thresholds.keys() == {1, 2, 3}
    config = TokensConfig(**{**config.__dict__, "thresholds": thresholds})
    kept = [shares(model, config, batch) for batch in batches(3)]
    mean = sum(sum(k.values()) / 3 for k in kept) / 3
    assert (
        keep - 0.1 < mean < keep + 0.02
    )  # blocks are 1/16 of a row; later layers see other states


def test_layers_that_do_nothing_are_thinned_first() -> None:
    """What layer 2 adds is 0: it has the highest threshold, and the loss is lower for it."""
    model = a.small("llama")
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()
        for i in (1, 3):
            model.model.layers[i].mlp.down_proj.weight.mul_(30)
        model.lm_head.weight.mul_(20)
        learned = []
        for batch in batches():
            labels = torch.nn.functional.pad(model(**batch).logits.argmax(-1), (1, 0))[:, :-1]
            learned.append({**batch, "labels": labels})
    thresholds = profile(model, learned, CONFIG, rounds=2)
    config = TokensConfig(**{**CONFIG.__dict__, "thresholds": thresholds})
    kept = shares(model, config, learned[0] | {"labels": None})
    assert kept[2] < CONFIG.keep - 0.05 < min(kept[1], kept[3])


def test_layers_that_share_a_set_share_a_threshold() -> None:
    config = TokensConfig(**{**CONFIG.__dict__, "share": 2})
    found = profile(a.small("llama"), batches(1), config, rounds=0)
    assert found[1] == found[2] != found[3]


def row(supervised: list[list[int]], length: int = 16, **kwargs: Any) -> Row:
    mask = torch.zeros(len(supervised), length, dtype=torch.bool)
    for number, places in enumerate(supervised):
        mask[number, places] = True
    return Row(mask, **kwargs)


def test_choose_keeps_what_reaches_the_threshold() -> None:
    config = TokensConfig(
        keep=0.25, block=4, sinks=0, recent=0, thresholds={5: 0.5, 6: 0.05, 7: 0.9}
    )
    score = torch.tensor([[1.0, 4, 2, 8], [80, 10, 10, 10]]).repeat_interleave(4, 1)
    rows = row([[], []])
    rows.require(config)
    # Row 0 has two blocks of at least half its largest, so row 1 adds its next best one.
    assert choose(score, rows, config, 0.25, 5).tolist() == [
        [4, 5, 6, 7, 12, 13, 14, 15], [0, 1, 2, 3, 4, 5, 6, 7],
    ]  # fmt: skip
    assert choose(score, rows, config, 0.25, 6).shape == (2, 16)
    assert choose(score, rows, config, 0.25, 7).tolist() == [[12, 13, 14, 15], [0, 1, 2, 3]]
    # The same for a score of any scale; no fewer than the share that a ramp has reached.
    assert choose(score * 1e-3, rows, config, 0.25, 7).tolist() == [[12, 13, 14, 15], [0, 1, 2, 3]]
    assert choose(score, rows, config, 0.75, 7).shape == (2, 12)
    with pytest.raises(ValueError, match="none for layer 8"):
        choose(score, rows, config, 0.25, 8)


def test_what_must_stay_comes_on_top_of_a_threshold() -> None:
    config = TokensConfig(keep=0.25, block=4, sinks=1, recent=0, thresholds={5: 0.9})
    score = torch.tensor([[1.0, 4, 2, 8]]).repeat_interleave(4, 1)
    rows = row([[5]])
    rows.require(config)
    found = choose(score, rows, config, 0.25, 5)
    assert {0, 1, 2, 3, 5, 12, 13, 14, 15} <= set(found[0].tolist()) and found.shape[1] == 12
    # Padding reaches no threshold, and is not what others are measured by.
    valid = (torch.arange(16) < 12)[None]
    padded = row([[]], valid=valid)
    config = TokensConfig(keep=0.25, block=4, sinks=0, recent=0, thresholds={5: 0.9})
    padded.require(config)
    assert choose(score, padded, config, 0.25, 5).tolist() == [[4, 5, 6, 7]]


def test_files_and_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    write_thresholds(path, {3: 0.25, 12: 1 / 3})
    assert read_thresholds(path) == {3: 0.25, 12: 1 / 3}
    with pytest.raises(ValueError, match="cannot read"):
        read_thresholds(tmp_path / "none")
    for text, message in (
        ("{", "not JSON"), ("[1]", "must map"), ("{}", "must map"), ('{"a": 1}', "'a': 1"),
        ('{"1": "x"}', "'1': 'x'"), ('{"1": NaN}', "nan"), ('{"1": true}', "True"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_thresholds(path)
    model = a.small("llama")
    for changes, message in (({"protect": True}, "protect"), ({"grad": "selected"}, "grad=all")):
        with pytest.raises(ValueError, match=message):
            profile(model, batches(1), TokensConfig(**{**CONFIG.__dict__, **changes}))
    with pytest.raises(ValueError, match="at least one batch"):
        profile(model, [], CONFIG)
    TokenSparsity(model, CONFIG)
    with pytest.raises(ValueError, match="no token sparsity yet"):
        profile(model, batches(1), CONFIG)
